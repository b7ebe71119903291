"""The development cluster, and a job that is submitted to it as it would be to a real one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest

from longtake.model import presets
from longtake.model.camera import parse_actions
from longtake.model.pipeline import WorldPipeline
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.store.video import read_video

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(900)]  # three stages, each a job of its own


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(root, s3_server) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches a fresh cluster of infra/cluster.sh, on ports of its own."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    others = ("RAY_ADDRESS", "PYTHONPATH")  # of the tests' shared cluster
    environment = {name: value for name, value in os.environ.items() if name not in others}
    command = ["bash", str(root / "infra" / "cluster.sh"), *(f"--{name}={port}" for name, port in ports.items())]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert child.stdout is not None
    try:
        lines = []
        for line in child.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                break
        exports = dict(re.findall(r"(RAY_AUTH\w+)=(\S+)", "".join(lines)))
        assert exports and "Ray runtime started" in lines[-1], "".join(lines)
        address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}"}
        yield environment | exports | address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)  # a shell in the background ignores SIGINT, and so do its children
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=3)  # Ray itself would wait for half a minute
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def submit(root, cluster, *job: str) -> str:
    """What the job printed, submitted as the readme says."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", ".", "--", "python", *job]
    child = subprocess.run(command, cwd=root, env=cluster, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def test_a_data_set_is_made(cluster, small_weights, root, tmp_path):
    chosen = ["--preset", "tiny", "--weights", str(small_weights), "--actions", "w-16", "--long", "0"]
    submit(root, cluster, "jobs/search_refine.py", *chosen, "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "index.html").is_file()
    assert len(list((tmp_path / "out" / "refined").glob("*.mp4"))) == 2


def test_stages_follow_each_other_from_an_object_store_to_weights_that_generate(cluster, root, tmp_path):
    boto3.client("s3").create_bucket(Bucket="submitted")
    write_random(LatentStore("s3://submitted/latents"), presets.get("tiny"), frames=9, clips=4)
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "vae").symlink_to(root / "weights" / "tiny" / "vae")
    init = ["--init", str(tmp_path / "autoencoder")]
    short = [f"--set={value}" for value in ("frames=9", "window=9", "batch_size=2", "cache=None", "log_every=1")]
    for stage in ("stage1_gdn", "stage2_hybrid", "stage3_minute"):
        run = str(tmp_path / stage)
        chosen = ["--preset", "tiny", "--data", "s3://submitted/latents", "--run", run, "--steps", "2", *short, *init]
        assert "step 2 of 2" in submit(root, cluster, f"jobs/{stage}.py", *chosen)
        init = ["--init", run]
    assert len(read_video(tmp_path / "stage3_minute" / "sample.mp4")) == 9
    weights = tmp_path / "stage3_minute" / "weights"
    world = WorldPipeline.from_pretrained("tiny", weights, parts=("dit", "text", "vae"))
    image = np.zeros((*world.config.image_size, 3), np.uint8)
    trajectory = parse_actions("w-8", fps=world.config.fps, image_size=world.config.image_size)
    assert world.decode(world.generate([image], ["a room"], [trajectory], [0], num_steps=2)).shape[0] == 9

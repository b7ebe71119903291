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

import pytest

pytestmark = pytest.mark.cpu


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture
def cluster(root) -> Iterator[dict[str, str]]:
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
        child.communicate()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def test_a_job_is_submitted_as_the_readme_says(cluster, small_weights, root, tmp_path):
    job = ["python", "jobs/search_refine.py", "--preset", "tiny", "--weights", str(small_weights), "--actions", "w-16"]
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command = [*submit, "--", *job, "--long", "0", "--out", str(tmp_path / "out")]
    child = subprocess.run(command, cwd=root, env=cluster, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert (tmp_path / "out" / "index.html").is_file()
    assert len(list((tmp_path / "out" / "refined").glob("*.mp4"))) == 2

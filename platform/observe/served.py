"""A server of ours as a process of its own, on a private cluster of this machine, and the processes of its replicas."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from longtake.model import presets, weights
from longtake.platform.observe.ray_cluster import connect

WARM, LONG = 60.0, 120.0  # seconds that a replica's memory may settle; and for which it must be seen from then on
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Replica:
    """A process of one deployment."""

    deployment: str
    name: str
    pid: int

    def memory(self) -> int | None:
        """Bytes that it shares with no other process; None when it has ended."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid).memory_info()
            return found.rss - found.shared
        return None


class Server(contextlib.AbstractContextManager):
    """`longtake serve` with these arguments, which answers at `url` within the context.

    program: what Python runs in its place.
    """

    def __init__(self, arguments: Sequence[str], program: Sequence[str] = ("-m", "longtake.serve")) -> None:
        os.environ.pop("RAY_ADDRESS", None)  # processes are told apart by their numbers on this machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, *program, "--port", str(port), *arguments]

    def __enter__(self) -> Server:
        connect(num_cpus=16)
        import ray

        address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self._process = subprocess.Popen(self._command, env={**os.environ, **address}, stdout=subprocess.DEVNULL)
        end = time.monotonic() + _START_SECONDS
        while not self.answers("/readyz"):
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(f"the server did not start: {' '.join(self._command)}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def answers(self, path: str) -> bool:
        """Whether a GET gets 200."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def replicas() -> list[Replica]:
    """Of the server on this cluster; those that run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    deployments = client.get_serve_details()["applications"]["longtake"]["deployments"]
    found = ((name, each) for name, details in deployments.items() for each in details["replicas"])
    return [Replica(name, each["replica_id"], each["pid"]) for name, each in found if each["state"] == "RUNNING"]


def growth(memory: Mapping[Replica, Sequence[tuple[float, int]]]) -> Iterator[tuple[str, float]]:
    """MB a minute of the replica of each kind that grew fastest, once it was warm; and how many were seen for long."""
    slopes: dict[str, list[float]] = defaultdict(list)
    for replica, samples in memory.items():
        warm = [(at, held) for at, held in samples if at - samples[0][0] >= WARM]
        if warm and warm[-1][0] - warm[0][0] >= LONG:
            at, held = np.array(warm, float).T
            slopes[replica.deployment.lower()].append(float(np.polyfit(at / 60, held / 1e6, 1)[0]))
    for kind, found in sorted(slopes.items()):
        yield f"{kind}_mb_a_minute", max(found)
        yield f"{kind}_replicas_seen", len(found)


def small_weights(preset: str, folder: Path) -> None:
    """The shipped weights at a size of which two cores make many."""
    config = weights.config_for(presets.get(preset), source := weights.resolve(presets.get(preset), None))
    shutil.copytree(source, folder)
    weights.save_config(dataclasses.replace(config, image_size=(64, 96)), folder)


@contextlib.contextmanager
def small_server(
    preset: str, settings: Sequence[str], *arguments: str, program: Sequence[str] = ("-m", "longtake.serve")
) -> Iterator[Server]:
    """A server of `small_weights`, with settings as --set takes them and other arguments."""
    with tempfile.TemporaryDirectory() as folder:
        small_weights(preset, Path(folder, "weights"))
        given = ["--preset", preset, "--weights", f"{folder}/weights", "--store", f"{folder}/store"]
        given += [word for setting in settings for word in ("--set", setting)]
        with Server([*given, *arguments], program) as server:
            yield server


def picture() -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

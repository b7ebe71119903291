"""What all tests share: the rule of one tier a test, one Ray cluster and one object store a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_DEVICES_NEEDED = {"cpu": 0, "gpu": 1, "multigpu": 2}

torch.set_num_threads(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests without exactly one tier; leave out those whose devices this machine lacks."""
    tiers = {item: [mark.name for mark in item.iter_markers() if mark.name in _DEVICES_NEEDED] for item in items}
    if wrong := [item.nodeid for item, names in tiers.items() if len(names) != 1]:
        raise pytest.UsageError("give each test exactly one of the markers cpu, gpu, multigpu:\n" + "\n".join(wrong))
    present = torch.cuda.device_count()
    runnable = [item for item in items if _DEVICES_NEEDED[tiers[item][0]] <= present]
    if len(runnable) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(runnable)])
        items[:] = runnable


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server on this machine, which the AWS_* variables point to meanwhile."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[str]:
    """The address of the run's one Ray cluster, of 8 logical CPUs; jobs in child processes join it by RAY_ADDRESS.

    It starts after the object store, so that its workers inherit the AWS_* variables.
    """
    import ray

    from longtake.platform.observe import ray_cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        ray_cluster.connect(num_cpus=8)
        address = ray.get_runtime_context().gcs_address
        environment.setenv("RAY_ADDRESS", address)
        yield address
    ray.shutdown()

"""What tests of whole applications share: the run's one HTTP proxy, and the keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.platform.observe.served import picture

KEYS = {"anna": "secret", "bert": "other"}
FEW = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1)


@pytest.fixture(scope="session")
def proxy(ray_cluster: str) -> Iterator[str]:
    """Its address."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="session")
def start(proxy: str) -> Callable[..., str]:
    """Starts the application, anew if it runs, with settings and a folder for all that it keeps; its address."""
    from ray import serve

    from longtake.serve.app import build

    def run(store: Path, prefix: str = "/", **settings: Any) -> str:
        digests = [{"name": n, "sha256": hashlib.sha256(k.encode()).hexdigest(), "videos": 3} for n, k in KEYS.items()]
        (store / "keys.json").write_text(json.dumps({"keys": digests}))
        # Where stages end together, one may wait for another that has ended.
        given = dict(store=str(store), keys=str(store / "keys.json"), drain=3) | settings
        serve.run(build(given), name="longtake", route_prefix=prefix)
        url = proxy + prefix.rstrip("/")
        while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
            time.sleep(0.2)
        return url

    return run


@pytest.fixture(scope="module")
def weights(small_config: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, of all parts, in chunks and blocks."""
    config = dataclasses.replace(
        small_config,
        name="tiny-streaming",
        fps=16.0,
        softmax_dtype="float32",
        chunk_causal=True,
        chunk_window=1,
        sampler=FEW,
        refiner=dataclasses.replace(small_config.refiner, block_size=3),
    )
    folder = tmp_path_factory.mktemp("weights")
    WorldPipeline.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image() -> bytes:
    return picture()


@pytest.fixture(scope="module")
def server(
    start: Callable[..., str], weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Callable]]:
    """Its address, its store, and what starts it anew there."""
    store = tmp_path_factory.mktemp("store")

    def again() -> str:
        limits: dict[str, Any] = dict(max_running=2, max_queued=2, max_upload=1 << 16, max_seconds=30, session_idle=15)
        return start(store, weights=str(weights), **limits)

    yield again(), store, again
    from ray import serve

    serve.delete("longtake")


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0)

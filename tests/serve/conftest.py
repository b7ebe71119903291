"""What tests of whole applications share: the run's one HTTP proxy, and the keys."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

KEYS = {"anna": "secret", "bert": "other"}


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
        given = dict(store=str(store), keys=str(store / "keys.json"), **settings)
        serve.run(build(given), name="longtake", route_prefix=prefix)
        url = proxy + prefix.rstrip("/")
        while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
            time.sleep(0.2)
        return url

    return run

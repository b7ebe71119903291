"""The client, of a server that answers what it is told to; with a real one it is in test_app.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import httpx
import pytest

from longtake.serve.client import ApiError, Client, VideoFailed, synchronous
from longtake.serve.client.wire import pause

pytestmark = pytest.mark.cpu

VIDEO = dict(id="video_1", status="queued", progress=0, frames=25, seconds="1.5", size="96x64", error=None)


def client_of(monkeypatch, *answers: httpx.Response) -> tuple[Client, list[httpx.Request], list[float]]:
    """A client whose server gives these answers, what it was asked, and the pauses between."""
    asked: list[httpx.Request] = []
    pauses: list[float] = []
    waiting = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        asked.append(request)
        return next(waiting)

    client = Client("http://server", key="secret")
    client._http = httpx.Client(
        base_url="http://server", headers=client._http.headers, transport=httpx.MockTransport(answer)
    )
    monkeypatch.setattr(synchronous.time, "sleep", pauses.append)
    return client, asked, pauses


def test_it_needs_nothing_of_what_the_server_needs(root):
    script = "import sys, longtake.serve.client; print(*{'torch', 'ray', 'numpy', 'fastapi'} & set(sys.modules))"
    child = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr


def test_a_request_that_is_to_come_later_is_sent_again_as_the_same(monkeypatch):
    busy = httpx.Response(429, headers={"Retry-After": "3"}, json={"error": {"message": "later", "param": None}})
    client, asked, pauses = client_of(monkeypatch, busy, httpx.Response(503), httpx.Response(200, json=VIDEO))
    video = client.create(b"png", "a hall", actions="w-24", poses=None, seconds=1.5)
    assert (video.id, video.finished, pauses) == ("video_1", False, [3.0, 1.0])
    assert len({request.headers["idempotency-key"] for request in asked}) == 1
    assert asked[0].headers["authorization"] == "Bearer secret"
    assert b'name="actions"' in asked[0].content and b'name="poses"' not in asked[0].content
    assert pause("soon", 9) == 8.0


def test_a_refusal_names_the_field(monkeypatch):
    body = {"error": {"message": "seconds: too many", "param": "seconds"}}
    client, *_ = client_of(monkeypatch, httpx.Response(400, json=body), httpx.Response(502, text="a proxy's page"))
    with pytest.raises(ApiError, match="seconds: too many") as refused:
        client.create(b"png", actions="w-24")
    assert (refused.value.status, refused.value.param) == (400, "seconds")
    with pytest.raises(ApiError, match="a proxy's page"):
        client.get("video_1")


def test_waiting_tells_how_far_it_is_and_ends_with_why_it_failed(monkeypatch):
    failed = VIDEO | {"status": "failed", "error": {"code": "failed", "message": "it diverged"}}
    steps = [VIDEO, VIDEO | {"status": "in_progress", "progress": 40}, failed]
    client, *_ = client_of(monkeypatch, *(httpx.Response(200, json=step) for step in steps))
    told: list[int] = []
    with pytest.raises(VideoFailed, match="it diverged"):
        client.wait("video_1", lambda video: told.append(video.progress))
    assert told == [0, 40, 0]


def test_pages_are_turned(monkeypatch):
    pages = [{"data": [VIDEO | {"id": f"video_{n}"}], "has_more": n < 2, "last_id": f"video_{n}"} for n in range(3)]
    client, asked, _ = client_of(monkeypatch, *(httpx.Response(200, content=json.dumps(page)) for page in pages))
    assert [video.id for video in client.videos()] == ["video_0", "video_1", "video_2"]
    assert asked[2].url.params["after"] == "video_1"

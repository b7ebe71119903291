"""A client that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from .session import LiveSession
from .wire import MOST_TRIES, RETRIED, Video, creation, headers, pause, refused


class Client:
    """Of the server at `url`. key: if it asks for one. timeout: seconds without a sign of it. Answers that say "later"
    are waited for a few times; others raise ApiError.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        self.url, self.key = url.rstrip("/"), key
        self._http = httpx.Client(base_url=self.url, headers=headers(key), timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def create(self, image: str | Path | bytes, prompt: str = "", **more: Any) -> Video:
        """Ask for a video; arguments as of `wire.creation`."""
        return Video.of(self._send(**creation(image, prompt, **more)).json())

    def get(self, id: str) -> Video:
        return Video.of(self._send("GET", f"/v1/videos/{id}").json())

    def videos(self) -> Iterator[Video]:
        """All of yours, the newest first."""
        after: dict[str, str] = {}
        while True:
            page = self._send("GET", "/v1/videos", params={"limit": "100", **after}).json()
            yield from map(Video.of, page["data"])
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def delete(self, id: str) -> None:
        self._send("DELETE", f"/v1/videos/{id}")

    def models(self) -> list[dict[str, Any]]:
        return self._send("GET", "/v1/models").json()["data"]

    def wait(self, id: str, told: Callable[[Video], object] | None = None, every: float = 0.5) -> Video:
        """The video, when it is made; told(video) each time it is asked for. VideoFailed when it cannot be made."""
        while not (video := self.get(id)).finished:
            if told:
                told(video)
            time.sleep(every)
        if told:
            told(video)
        return video.checked()

    def stream(self, id: str) -> Iterator[bytes]:
        """The video as it is made, in pieces of an MP4 file."""
        with self._http.stream("GET", f"/v1/videos/{id}/stream", timeout=None) as response:
            if response.is_error:
                raise refused(response.status_code, response.read())
            yield from response.iter_bytes()

    def save(self, id: str, path: str | Path, poses: str | Path | None = None) -> None:
        """Write a video that is made, and where its camera was (NumPy's .npz: c2w, intrinsics)."""
        Path(path).write_bytes(self._send("GET", f"/v1/videos/{id}/content").content)
        if poses is not None:
            Path(poses).write_bytes(self._send("GET", f"/v1/videos/{id}/content", params={"variant": "poses"}).content)

    def live(self, **begin: Any) -> LiveSession:
        """Begin a live session, or go on with one; arguments as of `LiveSession`."""
        return LiveSession(self.url, self.key, **begin)

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        for tried in range(MOST_TRIES):
            response = self._http.request(method, url, **options)
            if response.status_code not in RETRIED or tried == MOST_TRIES - 1:
                break
            time.sleep(pause(response.headers.get("retry-after"), tried))
        if response.is_error:
            raise refused(response.status_code, response.content)
        return response

"""A client that lets other work go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from .wire import MOST_TRIES, RETRIED, Video, creation, headers, pause, refused


class AsyncClient:
    """As `Client`, whose methods this one's are, awaited."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers(key), timeout=timeout)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def create(self, image: str | Path | bytes, prompt: str = "", **more: Any) -> Video:
        return Video.of((await self._send(**creation(image, prompt, **more))).json())

    async def get(self, id: str) -> Video:
        return Video.of((await self._send("GET", f"/v1/videos/{id}")).json())

    async def delete(self, id: str) -> None:
        await self._send("DELETE", f"/v1/videos/{id}")

    async def models(self) -> list[dict[str, Any]]:
        return (await self._send("GET", "/v1/models")).json()["data"]

    async def wait(self, id: str, told: Callable[[Video], object] | None = None, every: float = 0.5) -> Video:
        while not (video := await self.get(id)).finished:
            if told:
                told(video)
            await asyncio.sleep(every)
        if told:
            told(video)
        return video.checked()

    async def stream(self, id: str) -> AsyncIterator[bytes]:
        async with self._http.stream("GET", f"/v1/videos/{id}/stream", timeout=None) as response:
            if response.is_error:
                raise refused(response.status_code, await response.aread())
            async for part in response.aiter_bytes():
                yield part

    async def save(self, id: str, path: str | Path, poses: str | Path | None = None) -> None:
        Path(path).write_bytes((await self._send("GET", f"/v1/videos/{id}/content")).content)
        if poses is not None:
            found = await self._send("GET", f"/v1/videos/{id}/content", params={"variant": "poses"})
            Path(poses).write_bytes(found.content)

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        for tried in range(MOST_TRIES):
            response = await self._http.request(method, url, **options)
            if response.status_code not in RETRIED or tried == MOST_TRIES - 1:
                break
            await asyncio.sleep(pause(response.headers.get("retry-after"), tried))
        if response.is_error:
            raise refused(response.status_code, response.content)
        return response

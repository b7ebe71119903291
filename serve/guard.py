"""Who may ask, how often, and how much."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtake.serve.requests import Refused

_BURST_SECONDS = 10


@dataclass(frozen=True)
class Key:
    """name: whose videos these are. sha256: of the key, in hexadecimal. videos: that may wait or be made at once.
    requests_per_minute: to one replica of the API.
    """

    name: str
    sha256: str
    videos: int = 16
    requests_per_minute: float = 600.0


ANYBODY = Key("", "", videos=1 << 30, requests_per_minute=float("inf"))


class Guard:
    """Knows the keys of a file {"keys": [{"name": ..., "sha256": ...}]}; without one, anybody may ask. ValueError for a
    file that is none.
    """

    def __init__(self, file: str | None) -> None:
        self._keys = None if file is None else _read(Path(file))
        self._left: dict[str, tuple[float, float]] = {}

    def check(self, authorization: str | None) -> Key:
        """Whose request it is, by its header. Refused, when nobody's or one too many."""
        key = self._key(authorization)
        if key.requests_per_minute != float("inf"):
            rate = key.requests_per_minute / 60
            now, most = time.monotonic(), max(1.0, rate * _BURST_SECONDS)
            left, then = self._left.get(key.name, (most, now))
            left = min(most, left + rate * (now - then))
            if left < 1:
                wait = str(max(1, round((1 - left) / rate)))
                raise Refused(429, "too many requests: wait a little", headers={"Retry-After": wait})
            self._left[key.name] = left - 1, now
        return key

    def _key(self, authorization: str | None) -> Key:
        if self._keys is None:
            return ANYBODY
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogatepass")).hexdigest()
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if scheme.lower() != "bearer" or not found:
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "send a valid key: Authorization: Bearer KEY", headers=headers)
        return found[0]


def _read(path: Path) -> tuple[Key, ...]:
    try:
        keys = tuple(Key(**{**each, "sha256": each["sha256"].lower()}) for each in json.loads(path.read_text())["keys"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'keys: {path} must hold {{"keys": [{{"name": ..., "sha256": ...}}]}}: {error}') from None
    if len({key.name for key in keys}) < len(keys) or any(len(key.sha256) != 64 or not key.name for key in keys):
        raise ValueError(f"keys: {path}: each needs a name of its own, and the 64 digits of a SHA-256")
    return keys


class BodyLimit:
    """Middleware: a body longer than `most` bytes is refused as soon as that shows. Ray Serve copies the application
    before its settings are known, so the limit is the process's.
    """

    most = 16 << 20

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            await self._refuse(send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise TooLong
            return message

        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLong:
            if not begun:
                await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        body = json.dumps(Refused(413, f"a request has at most {self.most} bytes").body()).encode()
        headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class SameOrigin:
    """Middleware: pages of other origins change nothing and open no session. Without keys they could, since browsers
    send forms and open WebSockets to any address, this machine's own too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        hosts = headers.get(b"host"), headers.get(b"x-forwarded-host")
        if origin is None or scope.get("method") in ("GET", "HEAD") or origin.partition(b"://")[2] in hosts:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "another origin"})
        else:
            refused = Refused(403, "pages of other origins may not ask: a proxy in between must keep Host")
            await JSONResponse(refused.body(), 403)(scope, receive, send)


class TooLong(Exception):
    pass

"""Live sessions over a WebSocket: keys in, fragments of MP4 out.

A client begins with one of
    {"type": "start", "image": BASE64, "prompt", "seed", "fov_deg", "key_map", "refine", ...}   a new session
    {"type": "resume", "session": ID, "fragments": N}         one that goes on, or its end, after N fragments
    {"type": "fork", "session": ID, "chunks": N}              a new one that has the first N chunks of another
each with "key", where keys are asked for, and "wait": whether the server stops listening while more chunks than
look_ahead wait for theirs ("wait": true), or says that it dropped the actions. Then
    {"type": "actions", "actions": "w-24", "sequence": 7}     what is done in the next chunk, as the client counts it
    {"type": "end"}
The server answers
    {"type": "started", "session", "fps", "chunk", "size", "look_ahead"}
    {"type": "received", "sequence", "chunk"}  or  {"type": "dropped", "sequence"}
    {"type": "frames", "first", "frames", "chunk", "actions", "sequence"}, and the fragment as one binary message; the
        very first is the beginning of the file as well
    {"type": "closed", "reason"}  or  {"type": "error", "error": {...}}
A session is a video: others may watch its stream, and its content is there when it has ended. It ends when nobody has
said anything for `session_idle` seconds; a client that lost its connection has that long to resume.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.exceptions import RayError
from starlette.websockets import WebSocket, WebSocketDisconnect

from longtake.model.camera import Steering, actions_length
from longtake.serve.guard import Guard, Key
from longtake.serve.ledger import UNFINISHED, Record
from longtake.serve.requests import Refused, VideoRequest, checked, named, parsed
from longtake.serve.results import Results
from longtake.serve.settings import Settings
from longtake.serve.videos import WATCH_SECONDS

_FIRST_WORD = 20.0  # seconds until a client must have begun
_REFUSED, _LATER, _DONE = 1008, 1013, 1000  # codes of closing

Ask = Callable[..., Awaitable[Any]]  # a method of `Videos` by its name


class _Going(BaseModel):
    """What another session is gone on from."""

    model_config = ConfigDict(extra="forbid")

    session: str = Field(max_length=64)
    fragments: int = Field(0, ge=0)
    chunks: int = Field(0, ge=0)


class Live:
    """The session of one connection."""

    def __init__(self, socket: WebSocket, settings: Settings, results: Results, guard: Guard, ask: Ask) -> None:
        self.socket, self.settings, self.results, self.guard, self.ask = socket, settings, results, guard, ask
        self.config = settings.config
        self.wait = False

    async def run(self) -> None:
        """Until the client is gone, or the session has ended."""
        await self.socket.accept()
        try:
            key, record, sent = await self._begun()
            height, width = self.config.image_size
            await self._say(
                "started",
                session=record.id,
                fps=self.config.fps,
                chunk=self.config.frames_per_chunk,
                size=f"{width}x{height}",
                look_ahead=self.settings.look_ahead,
            )
            listening = asyncio.create_task(self._listen(key, record))
            showing = asyncio.create_task(self._show(record, sent))
            try:
                await asyncio.wait([listening, showing], return_when=asyncio.FIRST_COMPLETED)
                for task in (listening, showing):
                    if task.done():
                        task.result()
            finally:
                for task in (listening, showing):
                    task.cancel()
                await asyncio.gather(listening, showing, return_exceptions=True)
        except WebSocketDisconnect:
            pass
        except (Refused, FileNotFoundError) as error:
            refused = error if isinstance(error, Refused) else Refused(404, "session: it was deleted", "session")
            await self._say("error", **refused.body())
            await self.socket.close(_REFUSED)
        except (RayError, TimeoutError):
            await self._say("error", **Refused(503, "the server is busy or starts again: resume").body())
            await self.socket.close(_LATER)

    async def _begun(self) -> tuple[Key, Record, int]:
        """Whose session it is, the session, and how many fragments the client has."""
        try:
            said = await asyncio.wait_for(self._hear(), _FIRST_WORD)
        except TimeoutError:
            raise Refused(408, "say first what to begin: start, resume or fork", "type") from None
        given = said.pop("key", None)
        key = self.guard.check(
            f"Bearer {given}" if isinstance(given, str) else self.socket.headers.get("authorization")
        )
        self.wait = said.pop("wait", False) is True
        kind = said.pop("type", None)
        if kind == "start":
            return key, await self._start(key, said), 0
        if kind not in ("resume", "fork"):
            raise Refused(400, "type: say first what to begin: start, resume or fork", "type")
        try:
            going = _Going(**said)
        except ValidationError as error:
            raise named(error) from None
        if kind == "fork":
            record = await self.ask("fork", key.name, going.session, going.chunks)
        else:
            record = await self.ask("get", key.name, going.session)
        if record is None or not record.live:
            raise Refused(404, "session: there is no such session, or it has not so many chunks", "session")
        return key, record, going.fragments if kind == "resume" else 0

    async def _start(self, key: Key, said: dict[str, Any]) -> Record:
        for name in ("actions", "poses", "seconds"):
            if name in said:
                raise Refused(400, f"{name}: a session is told chunk by chunk", name)
        request = parsed(said | {"actions": "none-1"}, VideoRequest)
        wanted = await asyncio.to_thread(checked, request, None, self.settings.limits, True)
        kept = {name: value for name, value in wanted.request.items() if name != "actions"} | {"live": True}
        return await self.ask("open", key.name, kept, wanted.files)

    async def _listen(self, key: Key, record: Record) -> None:
        chunk = self.config.frames_per_chunk
        steering = Steering(record.request.get("key_map") or self.config.key_map, self.config.fps)
        while True:
            said = await self._hear()
            if said.get("type") == "end":
                await self.ask("end", key.name, record.id)
                continue
            keys, sequence = said.get("actions"), said.get("sequence")
            if said.get("type") != "actions" or not isinstance(keys, str) or len(keys) > 1000:
                raise Refused(400, "type: say actions or end", "type")
            if sequence is not None and (not isinstance(sequence, int) or not 0 <= sequence < 1 << 53):
                raise Refused(400, "sequence: it must be a whole number", "sequence")
            try:
                if keys and actions_length(keys) > chunk:
                    raise ValueError(f"a chunk has {chunk} frames: give fewer")
                if keys:
                    steering.move(keys)
            except ValueError as error:
                raise Refused(400, f"actions: {error}", "actions") from None
            number = await self.ask("act", key.name, record.id, keys, sequence, self.wait)
            if number is None:
                await self._say("dropped", sequence=sequence)
            else:
                await self._say("received", sequence=sequence, chunk=number)

    async def _show(self, record: Record, sent: int) -> None:
        chunk = self.config.frames_per_chunk
        while True:
            found = await self.ask("watch", record.owner, record.id, sent, WATCH_SECONDS)
            if found is None:
                raise Refused(404, "session: it was deleted", "session")
            now, there = found
            for number in range(sent, there):
                name = f"{record.id}/video/{number:05}"
                about = json.loads(await asyncio.to_thread(self.results.get, f"{name}.json"))
                last = about["first"] + about["frames"] - 1
                of = max(0, last - 1) // chunk
                keys, sequence = await self.ask("said", record.id, of)
                await self._say("frames", **about, chunk=of, actions=keys, sequence=sequence)
                fragment = await asyncio.to_thread(self.results.get, f"{name}.m4s")
                if number == 0:
                    fragment = await asyncio.to_thread(self.results.get, f"{record.id}/video/begin.mp4") + fragment
                await self.socket.send_bytes(fragment)
            sent = max(sent, there)
            if now.status not in UNFINISHED:
                reason = now.error or await self.ask("why_ended", record.id)
                await self._say("closed", reason=reason)
                await self.socket.close(_DONE)
                return

    async def _hear(self) -> dict[str, Any]:
        """What the client says next. Refused for what is no JSON object."""
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", _DONE))
        try:
            said = json.loads(message.get("text") or "")
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise Refused(400, "say JSON objects")
        return said

    async def _say(self, kind: str, **more: Any) -> None:
        await self.socket.send_text(json.dumps({"type": kind, **more}))

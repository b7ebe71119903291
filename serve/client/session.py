"""A live session: a video that goes where it is told, chunk by chunk."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from .wire import ApiError


@dataclass(frozen=True)
class Chunk:
    """A fragment of MP4; the very first of a session has the file's beginning, so that fragments glued together are a
    file. first: its first frame's number; actions: what was done in it; sequence: which of the calls of `act` said so.
    """

    number: int
    first: int
    frames: int
    actions: str
    sequence: int | None
    fragment: bytes


class LiveSession:
    """Begins at an image; or goes on with session `resume` after so many `fragments`; or branches off session `fork`
    after so many `chunks`. wait: let `act` wait while too many chunks wait, instead of dropping what it says.

    ApiError for what the server refuses. When the connection is lost, a session can be resumed for a while.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        image: str | Path | bytes | None = None,
        prompt: str = "",
        resume: str | None = None,
        fragments: int = 0,
        fork: str | None = None,
        chunks: int = 0,
        wait: bool = True,
        **more: Any,
    ) -> None:
        if sum(each is not None for each in (image, resume, fork)) != 1:
            raise ValueError("give one of image, resume and fork")
        begin: dict[str, Any] = {"wait": wait, **({} if key is None else {"key": key})}
        if image is not None:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            begin |= {"type": "start", "image": base64.b64encode(data).decode(), "prompt": prompt, **more}
        elif resume is not None:
            begin |= {"type": "resume", "session": resume, "fragments": fragments}
        else:
            begin |= {"type": "fork", "session": fork, "chunks": chunks}
        self._socket = connect(url.replace("http", "ws", 1) + "/v1/sessions", max_size=None)
        self._said = self.dropped = 0
        self.closed: str | None = None
        self._send(**begin)
        about = self._hear()
        self.id, self.fps, self.frames_per_chunk = about["session"], about["fps"], about["chunk"]

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def act(self, actions: str) -> int:
        """What is done in the next chunk, such as "w-16,dw-8"; the number of this call, from 0."""
        self._send(type="actions", actions=actions, sequence=self._said)
        self._said += 1
        return self._said - 1

    def end(self) -> None:
        """Let the video end after what was said; `chunks` goes on until then."""
        self._send(type="end")

    def chunks(self) -> Iterator[Chunk]:
        """Fragment after fragment as they are made, until the session is `closed`, which then is why."""
        while self.closed is None:
            said = self._hear()
            if said["type"] == "frames":
                fragment = self._socket.recv()
                assert isinstance(fragment, bytes)
                named = {name: said[name] for name in ("first", "frames", "actions", "sequence")}
                yield Chunk(number=said["chunk"], fragment=fragment, **named)
            elif said["type"] == "dropped":
                self.dropped += 1
            elif said["type"] == "closed":
                self.closed = said["reason"]

    def _send(self, **what: Any) -> None:
        self._socket.send(json.dumps(what))

    def _hear(self) -> dict[str, Any]:
        said = json.loads(self._socket.recv())
        if said["type"] == "error":
            raise ApiError(400, said["error"]["message"], said["error"]["param"])
        return said

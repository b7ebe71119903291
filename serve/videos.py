"""The one deployment that knows of all videos: it accepts them, has them made, and outlasts whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from longtake.platform.observe.job import user_message
from longtake.serve.ledger import COMPLETED, FAILED, QUEUED, RUNNING, UNFINISHED, Ledger, Record
from longtake.serve.results import Results
from longtake.serve.settings import Settings
from longtake.serve.task import ENDLESS, Task

_ATTEMPTS = 8  # in a row, none of which made a chunk
WATCH_SECONDS = 20.0  # that one `watch` lasts, at most
_LONGEST_PAUSE = 10.0  # seconds between two
_log = logging.getLogger("longtake.serve")


class Busy(Exception):
    """Too many videos wait; seconds until it is worth asking again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message, seconds)
        self.message, self.seconds = message, seconds


@serve.deployment
class Videos:
    """One replica. What it has accepted lies in the `Ledger`, so another one that takes its place goes on."""

    async def __init__(self, settings: Settings, text: DeploymentHandle, decoder: DeploymentHandle) -> None:
        self.settings, self.text, self.decoder = settings, text, decoder
        self.ledger, self.results = Ledger(settings.ledger), Results(settings.store)
        self._waiting: deque[str] = deque()
        self._arriving: Counter[tuple[bool, str]] = Counter()  # videos being written, by whether live, and owner
        self._tasks: dict[str, asyncio.Task] = {}
        self._seconds: deque[float] = deque(maxlen=32)  # that the last videos took
        self._moved = asyncio.Event()  # the next move; no lock, which one who is cancelled while waiting can leave shut
        self._making: set[str] = set()  # of the tasks, those that waited in the queue
        self._runs: dict[str, str] = {}  # which attempt to make it is the last
        self._begun: dict[str, int] = {}  # of live videos, the chunk that is being made
        self._ended: dict[str, str] = {}  # of those that end, why
        for record in self.ledger.unfinished():
            if record.live:
                self._tasks[record.id] = asyncio.create_task(self._make(record.id))
            else:
                self.ledger.update(record.id, status=QUEUED)
                self._waiting.append(record.id)
        for id in await asyncio.to_thread(self.results.folders):
            if id.startswith("video_") and self.ledger.get(id) is None:  # deleted while a stage still wrote
                await asyncio.to_thread(self.results.remove, id)
        self._start()

    async def submit(
        self, owner: str, request: dict[str, Any], total: int, most: int, once: str | None, given: dict[str, bytes]
    ) -> Record:
        """Accept a video of `total` frames with its files, once for each `once`. Busy when too many wait, of all or,
        more than `most`, of this owner.
        """
        if once and (before := self.ledger.once(owner, once)):
            return before
        unfinished = [record for record in self.ledger.unfinished() if not record.live]
        if len(unfinished) + self._coming(False) >= self.settings.max_queued + self.settings.max_running:
            raise Busy(f"{len(unfinished)} videos wait or are made: try again later", self._until_next())
        own = sum(record.owner == owner for record in unfinished) + self._arriving[False, owner]
        if own >= most:
            raise Busy(f"{own} of your videos wait or are made, and no more may be", self._until_next())
        record = Record(_new_id(), owner, request, total, once)
        with self._arrival(False, owner):
            await self._put(record.id, given)
        if (kept := self.ledger.add(record)) is not record:  # the same request was sent twice at once
            await asyncio.to_thread(self.results.remove, record.id)
            return kept
        self._waiting.append(record.id)
        self._start()
        return record

    async def open(self, owner: str, request: dict[str, Any], given: dict[str, bytes]) -> Record:
        """Begin a live video. Busy when there are too many."""
        self._check_room()
        record = Record(_new_id(), owner, request, 0, status=RUNNING)
        with self._arrival(True, owner):
            await self._put(record.id, given)
        return self._opened(record)

    async def fork(self, owner: str, id: str, chunks: int) -> Record | None:
        """Another live video that has the first `chunks` of this one; None when it has not so many. Busy when there are
        too many.
        """
        self._check_room()
        if (parent := await self.get(owner, id)) is None or not parent.live:
            return None  # before its name becomes a path
        there = await asyncio.to_thread(self.results.numbered, f"{id}/stage1")
        if not 0 <= chunks <= min(there, self.ledger.given(id)):
            return None
        record = Record(_new_id(), owner, parent.request, 0, status=RUNNING)
        with self._arrival(True, owner):
            try:
                await asyncio.to_thread(self.results.copy, id, record.id, chunks)
            except FileNotFoundError:  # the other ended, or was deleted, meanwhile
                await asyncio.to_thread(self.results.remove, record.id)
                return None
        self.ledger.copy_actions(id, record.id, chunks)
        return self._opened(record)

    @contextlib.contextmanager
    def _arrival(self, live: bool, owner: str) -> Iterator[None]:
        """While a video's files are written, it counts."""
        self._arriving[live, owner] += 1
        try:
            yield
        finally:
            self._arriving[live, owner] -= 1

    def _coming(self, live: bool) -> int:
        return sum(count for (of_live, _), count in self._arriving.items() if of_live == live)

    def _check_room(self) -> None:
        live = sum(record.live for record in self.ledger.unfinished()) + self._coming(True)
        if live >= self.settings.max_sessions:
            raise Busy(f"{live} sessions are open, and no more may be", max(1, round(self.settings.session_idle / 4)))

    def _opened(self, record: Record) -> Record:
        self.ledger.add(record)
        self._tasks[record.id] = asyncio.create_task(self._make(record.id))
        return record

    async def act(self, owner: str, id: str, keys: str, sequence: int | None, wait: bool) -> int | None:
        """Do so in the next chunk that has no actions; its number. None when the video has ended, and, unless it is
        waited for, when more chunks than `look_ahead` have some already.
        """
        while (record := await self.get(owner, id)) is not None and record.status == RUNNING and id not in self._ended:
            moved = self._moved
            number = self.ledger.given(id)
            if number <= self._begun.get(id, 0) + self.settings.look_ahead:
                self.ledger.act(id, number, keys, sequence)
                self._told()
                return number
            if not wait:
                return None
            await moved.wait()
        return None

    async def next(self, id: str, run: str, number: int) -> str | None:
        """Whether this run is to make chunk `number`: None when it is not wanted any more. The keys of a live one, when
        they are given; None when it ends there.
        """
        end = time.monotonic() + self.settings.session_idle
        while (record := self.ledger.get(id)) is not None and self._runs.get(id) == run:
            if not record.live:
                return ""
            if self._begun.get(id) != number:
                self._begun[id] = number
                self._told()
            moved = self._moved
            if found := self.ledger.actions(id, number):
                return found[0]
            left = end - time.monotonic()
            if id in self._ended or left <= 0:
                self._ended.setdefault(id, "idle")
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(moved.wait(), left)
        return None

    async def said(self, id: str, number: int) -> tuple[str, int | None]:
        """The keys of a chunk, and how their person counts them."""
        return self.ledger.actions(id, number) or ("", None)

    async def end(self, owner: str, id: str) -> None:
        """Let a live video end after the chunk that is being made."""
        if (record := await self.get(owner, id)) is not None and record.live:
            self._ended.setdefault(id, "ended")
            self._told()

    async def why_ended(self, id: str) -> str:
        return self._ended.get(id, "ended")

    async def get(self, owner: str, id: str) -> Record | None:
        record = self.ledger.get(id)
        return record if record is not None and record.owner == owner else None

    async def page(self, owner: str, limit: int, after: str | None, newest_first: bool) -> list[Record] | None:
        """A page; None when there is no video `after`."""
        before = None if after is None else await self.get(owner, after)
        if after is not None and before is None:
            return None
        return self.ledger.page(owner, limit, before, newest_first)

    async def delete(self, owner: str, id: str) -> bool:
        """Forget it, with its files; what is being made of it ends by itself."""
        if await self.get(owner, id) is None:
            return False
        self.ledger.remove(id)
        self._ended.pop(id, None)
        if id in self._waiting:
            self._waiting.remove(id)
        await asyncio.to_thread(self.results.remove, id)
        self._told()
        return True

    async def watch(self, owner: str, id: str, fragments: int, seconds: float) -> tuple[Record, int] | None:
        """The record and how many fragments there are, once these are more than `fragments`, the video is done, or
        the seconds have passed.
        """
        end = time.monotonic() + seconds
        while True:
            moved = self._moved
            if (record := await self.get(owner, id)) is None:
                return None
            count = await asyncio.to_thread(self.results.numbered, f"{id}/video", ".m4s")
            left = end - time.monotonic()
            if count > fragments or record.status not in UNFINISHED or left <= 0:
                return record, count
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(moved.wait(), left)

    async def figures(self) -> dict[str, float]:
        """For a scrape."""
        counts = self.ledger.counts()
        found: dict[str, float] = {
            f"videos_{each}": counts.get(each, 0) for each in (QUEUED, RUNNING, COMPLETED, FAILED)
        }
        return found | {"video_seconds_mean": self._mean()}

    def _until_next(self) -> int:
        return max(1, round((self._mean() or 10.0) / self.settings.max_running))

    def _mean(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def _start(self) -> None:
        while self._waiting and len(self._making) < self.settings.max_running:
            id = self._waiting.popleft()
            self._making.add(id)
            self._tasks[id] = asyncio.create_task(self._make(id))

    async def _make(self, id: str) -> None:
        begin = time.monotonic()
        try:
            record = self.ledger.get(id)
            if record is None:
                return
            self.ledger.update(id, status=RUNNING, started_at=record.started_at or time.time())
            error = await self._outlasting(record)
            if self.ledger.get(id) is None:  # deleted meanwhile, while a stage still wrote
                await asyncio.to_thread(self.results.remove, id)
                return
            self.ledger.update(id, completed_at=time.time(), status=FAILED if error else COMPLETED, error=error)
            if not record.live:
                self._seconds.append(time.monotonic() - begin)
        finally:
            del self._tasks[id]
            self._making.discard(id)
            self._begun.pop(id, None)
            self._runs.pop(id, None)
            self._start()
            self._told()

    async def _outlasting(self, record: Record) -> str | None:
        """Have the video made, again and again while replicas die under it; what a person is told if it cannot be."""
        failed = 0
        while failed < _ATTEMPTS:
            before = await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s")
            try:
                await self._made(record)
                return None
            except Exception as error:
                if self.ledger.get(record.id) is None:
                    return None
                if isinstance(error, ValueError) and (message := user_message(error)):
                    return message
                _log.warning("%s stopped: %s", record.id, error)
                if not isinstance(error, RayError):
                    _log.exception("a fault in the server")
            now = await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s")
            failed = 0 if now > before else failed + 1
            await asyncio.sleep(min(_LONGEST_PAUSE, 0.5 * 2**failed))
        return "the server could not make it: ask for it again, and tell who runs the server if that fails too"

    async def _made(self, record: Record) -> None:
        request = record.request
        if await asyncio.to_thread(self.results.has, f"{record.id}/content.mp4"):
            return
        if not await asyncio.to_thread(self.results.has, f"{record.id}/text.safetensors"):
            await self.text.read.remote(record.id, request["prompt"], request["refine"])
        frames = ENDLESS if record.live else record.total
        self._runs[record.id] = run = uuid.uuid4().hex
        task = Task(record.id, run, request["seed"], frames, request["refine"], record.live, request.get("key_map"))
        stream: Any = self.decoder.options(stream=True).fragments.remote(task)
        async for frames in stream:
            self.ledger.update(record.id, parts=frames)
            self._told()
        if self.ledger.get(record.id) is None:
            return
        if await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s"):
            await self.decoder.finish.remote(task)

    async def _put(self, id: str, given: dict[str, bytes]) -> None:
        for name, data in given.items():
            await asyncio.to_thread(self.results.put, f"{id}/{name}", data)

    def _told(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


def _new_id() -> str:
    return f"video_{uuid.uuid4().hex}"

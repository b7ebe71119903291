"""The one deployment that knows of all videos: it accepts them, has them made, and outlasts whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextvars import Context
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from longtake.platform.observe.job import user_message
from longtake.serve.ledger import COMPLETED, FAILED, QUEUED, RUNNING, UNFINISHED, Ledger, Record, Search
from longtake.serve.requests import Wanted
from longtake.serve.results import Results
from longtake.serve.searches import ATTEMPTS, Searches, pause
from longtake.serve.settings import Settings
from longtake.serve.task import ENDLESS, Task

WATCH_SECONDS = 20.0  # that one `watch` lasts, at most
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
        self._counts: defaultdict[str, float] = defaultdict(float)  # of this process, by their names in `metrics`
        self._moved = asyncio.Event()  # the next move; no lock, which one who is cancelled while waiting can leave shut
        self._making: set[str] = set()  # of the tasks, those that waited in the queue
        self._runs: dict[str, str] = {}  # which attempt to make it is the last
        self._begun: dict[str, int] = {}  # of live videos, the chunk that is being made
        self._ended: dict[str, str] = {}  # of those that end, why
        self._heard: dict[str, float] = {}  # of those that are made, when a stage last said something
        self._asking: Counter[str] = Counter()  # of live ones, how many stages wait for their keys
        for record in self.ledger.unfinished():
            if record.live:
                self._begin(record.id)
            elif self.ledger.searches.get(record.request.get("search", "")) is None and "search" in record.request:
                self.ledger.remove(record.id)  # its search was not accepted
            else:
                self.ledger.update(record.id, status=QUEUED)
                self._waiting.append(record.id)
        for id in await asyncio.to_thread(self.results.folders):
            if id.startswith("video_") and self.ledger.get(id) is None:  # deleted while a stage still wrote
                await asyncio.to_thread(self.results.remove, id)
        self.searches = Searches(self)
        self._start()

    async def submit(self, owner: str, wanted: Wanted, most: int, once: str | None) -> Record:
        """Accept a video, once for each `once`. Busy when too many wait, of all or, more than `most`, of this owner."""
        if once and (before := self.ledger.once(owner, once)):
            return before
        return (await self.accept(owner, [wanted], most, once))[0]

    async def accept(self, owner: str, wanted: Sequence[Wanted], most: int, once: str | None = None) -> list[Record]:
        """All of these videos or none. Busy as `submit`. With a `once` it is one."""
        unfinished = [record for record in self.ledger.unfinished() if not record.live]
        room = self.settings.max_queued + self.settings.max_running
        if len(unfinished) + self._coming(False) + len(wanted) > room:
            raise self._busy(f"{len(unfinished)} videos wait or are made: try again later", self._until_next())
        own = sum(record.owner == owner for record in unfinished) + self._arriving[False, owner]
        if own + len(wanted) > most:
            raise self._busy(f"{own} of your videos wait or are made, and at most {most} may be", self._until_next())
        records = [Record(_new_id(), owner, each.request, each.frames, once) for each in wanted]
        with self._arrival(False, owner, len(records)):
            for record, each in zip(records, wanted, strict=True):
                await self._put(record.id, each.files)
        for number, record in enumerate(records):
            if (kept := self.ledger.add(record)) is not record:  # the same request was sent twice at once
                await asyncio.to_thread(self.results.remove, record.id)
                records[number] = kept
            else:
                self._waiting.append(record.id)
        self._start()
        return records

    async def go_on(self, parent: Record, request: dict[str, Any]) -> Record:
        """A video from the latents of another, as the first that waits."""
        once = f"\0of {parent.id}"  # which no client can send
        if before := self.ledger.once(parent.owner, once):
            return before
        record = Record(_new_id(), parent.owner, request, parent.total, once)
        there = await asyncio.to_thread(self.results.numbered, f"{parent.id}/stage1")
        await asyncio.to_thread(self.results.copy, parent.id, record.id, there)
        self.ledger.add(record)
        self._waiting.appendleft(record.id)
        self._start()
        return record

    async def done(self, id: str) -> Record | None:
        """Wait until it is; None when there is none any more."""
        while (record := self.ledger.get(id)) is not None and record.status in UNFINISHED:
            await self._moved.wait()
        return record

    async def search(
        self, owner: str, request: dict[str, Any], wanted: Sequence[Wanted], most: int, once: str | None
    ) -> tuple[Search, dict[str, Record]] | None:
        search = await self.searches.submit(owner, request, wanted, most, once)
        return self.searches.get(owner, search.id)

    async def get_search(self, owner: str, id: str) -> tuple[Search, dict[str, Record]] | None:
        return self.searches.get(owner, id)

    async def page_searches(
        self, owner: str, limit: int, after: str | None, newest_first: bool
    ) -> list[tuple[Search, dict[str, Record]]] | None:
        return self.searches.page(owner, limit, after, newest_first)

    async def delete_search(self, owner: str, id: str) -> bool:
        return await self.searches.delete(owner, id)

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
    def _arrival(self, live: bool, owner: str, count: int = 1) -> Iterator[None]:
        """While videos' files are written, they count."""
        self._arriving[live, owner] += count
        try:
            yield
        finally:
            self._arriving[live, owner] -= count

    def _coming(self, live: bool) -> int:
        return sum(count for (of_live, _), count in self._arriving.items() if of_live == live)

    def _check_room(self) -> None:
        if (live := self._sessions() + self._coming(True)) >= self.settings.max_sessions:
            later = max(1, round(self.settings.session_idle / 4))
            raise self._busy(f"{live} sessions are open, and no more may be", later)

    def _sessions(self) -> int:
        return sum(record.live for record in self.ledger.unfinished())

    def _busy(self, message: str, seconds: int) -> Busy:
        self._counts["longtake_busy_total"] += 1
        return Busy(message, seconds)

    def _opened(self, record: Record) -> Record:
        self.ledger.add(record)
        self._begin(record.id)
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
        self._asking[id] += 1
        try:
            return await self._next(id, run, number)
        finally:
            self._asking[id] -= 1
            self._heard[id] = time.monotonic()
            if id not in self._tasks:
                self._forget(id)

    async def _next(self, id: str, run: str, number: int) -> str | None:
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
        return self.ledger.owned(owner, id)

    async def page(self, owner: str, limit: int, after: str | None, newest_first: bool) -> list[Record] | None:
        """A page; None when there is no video `after`."""
        return self.ledger.page_after(owner, limit, after, newest_first)

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
        """For a scrape, as `metrics` names them."""
        there, settings = self.ledger.counts(), self.settings
        room = {"made": settings.max_running, "live": settings.max_sessions, "queued": settings.max_queued}
        found: dict[str, float] = {
            f"longtake_videos_{each}": there.get(each, 0) for each in (QUEUED, RUNNING, COMPLETED, FAILED)
        }
        found["longtake_sessions"] = self._sessions()
        found |= {f'longtake_room{{of="{kind}"}}': most for kind, most in room.items()}
        return found | {name: self._counts[name] for name in _COUNTED}

    def _until_next(self) -> int:
        return max(1, round((self._mean() or 10.0) / self.settings.max_running))

    def _mean(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def _start(self) -> None:
        while self._waiting and len(self._making) < self.settings.max_running:
            id = self._waiting.popleft()
            self._making.add(id)
            self._begin(id)

    def _begin(self, id: str) -> None:
        """In a context of its own: in that of the request which brought it, Ray Serve would cancel what is asked of
        the stages as soon as that request's client is gone.
        """
        self._tasks[id] = asyncio.create_task(self._make(id), context=Context())

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
            status = FAILED if error else COMPLETED
            self.ledger.update(id, completed_at=time.time(), status=status, error=error)
            self._counts[_ended(status)] += 1
            if not record.live:
                self._seconds.append(seconds := time.monotonic() - begin)
                self._counts["longtake_video_seconds_sum"] += seconds
                self._counts["longtake_video_seconds_count"] += 1
        finally:
            del self._tasks[id]
            self._making.discard(id)
            self._forget(id)
            self._start()
            self._told()

    def _forget(self, id: str) -> None:
        for known in (self._begun, self._runs, self._heard, self._asking):
            known.pop(id, None)

    async def _outlasting(self, record: Record) -> str | None:
        """Have the video made, again and again while replicas die under it; what a person is told if it cannot be."""
        failed = 0
        while failed < ATTEMPTS:
            before = await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s")
            try:
                await self._made(record)
                return None
            except Exception as error:
                if self.ledger.get(record.id) is None:
                    return None
                if isinstance(error, ValueError) and (message := user_message(error)):
                    return message
                self._counts["longtake_retries_total"] += 1
                _log.warning("%s stopped: %s", record.id, error)
                if not isinstance(error, RayError | TimeoutError):
                    _log.exception("a fault in the server")
            now = await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s")
            failed = 0 if now > before else failed + 1
            await pause(failed)
        return "the server could not make it: ask for it again, and tell who runs the server if that fails too"

    async def _made(self, record: Record) -> None:
        request = record.request
        if await asyncio.to_thread(self.results.has, f"{record.id}/content.mp4"):
            return
        if not await asyncio.to_thread(self.results.has, f"{record.id}/text.safetensors"):
            await self._answer(record.id, self.text.read.remote(record.id, request["prompt"], request["refine"]))
        if draft := "search" in request:
            await self.searches.begin(record)
        frames = ENDLESS if record.live else record.total
        self._runs[record.id] = run = uuid.uuid4().hex
        keys = request.get("key_map")
        task = Task(record.id, run, request["seed"], frames, request["refine"], record.live, keys, draft)
        stream: Any = self.decoder.options(stream=True).fragments.remote(task)
        there = self.ledger.get(record.id)
        before = 0 if there is None else there.parts
        while (frames := await self._answer(record.id, anext(stream, None))) is not None:
            self._counts["longtake_frames_total"] += max(0, frames - before)
            before = max(before, frames)
            self.ledger.update(record.id, parts=frames)
            self._told()
        if self.ledger.get(record.id) is None:
            return
        if await asyncio.to_thread(self.results.numbered, f"{record.id}/video", ".m4s"):
            await self._answer(record.id, self.decoder.finish.remote(task))

    async def _answer(self, id: str, asked: Any) -> Any:
        """What a stage answers. TimeoutError when no stage says anything of the video for `stalled` seconds; what was
        asked is left, not cancelled.
        """

        async def wait() -> Any:
            return await asked

        self._heard[id] = time.monotonic()
        answer = asyncio.ensure_future(wait())
        while not answer.done():
            left = self._heard[id] + self.settings.stalled - time.monotonic()
            if left <= 0 and not self._asking[id]:
                answer.add_done_callback(lambda late: late.cancelled() or late.exception())
                raise TimeoutError(f"no stage said anything for {self.settings.stalled} s")
            await asyncio.wait([answer], timeout=max(left, 1.0))
        return answer.result()

    async def _put(self, id: str, given: dict[str, bytes]) -> None:
        for name, data in given.items():
            await asyncio.to_thread(self.results.put, f"{id}/{name}", data)

    def _told(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


def _ended(status: str) -> str:
    return f'longtake_videos_ended_total{{status="{status}"}}'


_COUNTED = (
    *(_ended(status) for status in (COMPLETED, FAILED)),
    *(f"longtake_{name}" for name in ("busy_total", "retries_total", "frames_total")),
    *(f"longtake_video_seconds_{part}" for part in ("sum", "count")),
)


def _new_id() -> str:
    return f"video_{uuid.uuid4().hex}"

"""Searches: many videos from one image, unrefined, of which the best are refined. `Videos` makes them."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import time
import uuid
from collections.abc import Sequence
from contextvars import Context
from typing import Any

import numpy as np
from ray.exceptions import RayError

from longtake.platform.evaluate.scores import WEIGHTS
from longtake.platform.search.selection import Rule
from longtake.serve.ledger import COMPLETED, FAILED, RUNNING, Record, Search
from longtake.serve.requests import Wanted

ATTEMPTS = 8  # in a row, none of which got any further
_LONGEST_PAUSE = 10.0  # seconds between two
_log = logging.getLogger("longtake.serve")


class Searches:
    """A search is a list of videos in the ledger, and a task that judges each when it is whole. A candidate that begins
    like another takes over what that one has made by then: its latents are the same.
    """

    def __init__(self, videos: Any) -> None:  # of `Videos`, which to a type checker is a deployment
        self._videos, self._table = videos, videos.ledger.searches
        self._tasks: dict[str, asyncio.Task] = {}
        for search in self._table.unfinished():
            self._begin(search.id)

    async def submit(
        self, owner: str, request: dict[str, Any], wanted: Sequence[Wanted], most: int, once: str | None
    ) -> Search:
        """Accept all candidates or, Busy, none."""
        if once and (before := self._table.once(owner, once)):
            return before
        search = Search(f"search_{uuid.uuid4().hex}", owner, request, [], once)
        drafts = [dataclasses.replace(each, request=each.request | {"search": search.id}) for each in wanted]
        accepted = await self._videos.accept(owner, drafts, most)
        search.candidates = [
            {"video": record.id, "actions": record.request["actions"], "seed": record.request["seed"]}
            for record in accepted
        ]
        if (kept := self._table.add(search)) is not search:  # the same request was sent twice at once
            for record in accepted:
                await self._videos.delete(owner, record.id)
            return kept
        self._begin(search.id)
        return search

    def _begin(self, id: str) -> None:
        self._tasks[id] = asyncio.create_task(self._run(id), context=Context())  # as `Videos` begins its own

    def get(self, owner: str, id: str) -> tuple[Search, dict[str, Record]] | None:
        """With its videos that are still there."""
        search = self._table.owned(owner, id)
        return None if search is None else (search, self._records(search))

    def page(
        self, owner: str, limit: int, after: str | None, newest_first: bool
    ) -> list[tuple[Search, dict[str, Record]]] | None:
        """A page; None when there is no search `after`."""
        found = self._table.page_after(owner, limit, after, newest_first)
        return None if found is None else [(each, self._records(each)) for each in found]

    async def delete(self, owner: str, id: str) -> bool:
        """Forget it and all its videos."""
        if (found := self.get(owner, id)) is None:
            return False
        self._table.remove(id)
        for video in found[1]:
            await self._videos.delete(owner, video)
        return True

    async def begin(self, record: Record) -> None:
        """Before a candidate is made: give it the chunks that it shares with another."""
        found = self._table.get(record.request["search"])
        results, chunk = self._videos.results, self._videos.settings.config.frames_per_chunk
        others = [each["video"] for each in found.candidates if each["seed"] == record.request["seed"]] if found else []

        def lend() -> None:
            mine, most, best = _path(results.get(f"{record.id}/path.npz")), 0, None
            for other in others:
                made = 0 if other == record.id else results.numbered(f"{other}/stage1")
                if made > most and results.has(f"{other}/path.npz"):
                    alike = _alike(mine, _path(results.get(f"{other}/path.npz")))
                    if (shared := min(made, max(0, alike - 1) // chunk)) > most:
                        most, best = shared, other
            if best:
                results.lend(best, record.id, most)

        await asyncio.to_thread(lend)

    def _records(self, search: Search) -> dict[str, Record]:
        ids = [id for each in search.candidates for id in (each["video"], each.get("refined")) if id]
        return {id: record for id in ids if (record := self._videos.ledger.get(id)) is not None}

    async def _run(self, id: str) -> None:
        failed = 0
        try:
            while True:
                try:
                    await self._choose(id)
                    return
                except Exception as error:
                    failed += 1
                    if not isinstance(error, RayError) or failed == ATTEMPTS:
                        _log.exception("%s cannot go on", id)
                        said = "the server could not finish it: its videos are there, ask for another search"
                        self._table.update(id, status=FAILED, completed_at=time.time(), error=said)
                        return
                    _log.warning("%s stopped: %s", id, error)
                    await pause(failed)
        finally:
            del self._tasks[id]

    async def _choose(self, id: str) -> None:
        """From where it was left."""
        if (search := self._table.get(id)) is None:
            return
        self._table.update(id, status=RUNNING)
        for candidate in search.candidates:
            record = await self._videos.done(candidate["video"])
            if record is not None and record.status == COMPLETED and "scores" not in candidate:
                scores, descriptor = await self._videos.decoder.judge.remote(record.id)
                candidate |= {"scores": scores, "descriptor": descriptor}
                self._table.update(id, candidates=search.candidates)
        judged = {each["video"]: each for each in search.candidates if "scores" in each}
        rule = Rule(search.request["keep"], search.request.get("scores") or WEIGHTS)
        for row in rule.ranked([each | {"key": video} for video, each in judged.items()]):
            candidate = judged[row["key"]]
            candidate |= {"total": row["total"], "kept": row["selected"]}
            candidate["scores"] |= {"novelty": row["novelty"]}
        if search.request["refine"]:
            await self._refine(search, [each for each in judged.values() if each["kept"]])
        for video in judged:
            await asyncio.to_thread(self._videos.results.remove, f"{video}/stage1")
        status = COMPLETED if judged else FAILED
        error = None if judged else "none of its videos could be made"
        candidates = search.candidates
        self._table.update(id, status=status, completed_at=time.time(), candidates=candidates, error=error)

    async def _refine(self, search: Search, kept: Sequence[dict[str, Any]]) -> None:
        """A new video of each, from the latents that there are."""
        videos = self._videos
        for candidate in kept:
            record = videos.ledger.get(candidate["video"])
            if "refined" not in candidate and record is not None and self._table.get(search.id) is not None:
                request = record.request | {"refine": True}
                refined = await videos.go_on(record, {k: v for k, v in request.items() if k != "search"})
                candidate["refined"] = refined.id
                self._table.update(search.id, candidates=search.candidates)
        for candidate in kept:
            if "refined" in candidate:
                await videos.done(candidate["refined"])


async def pause(failed: int) -> None:
    """Before it is tried again, after so many failures."""
    await asyncio.sleep(min(_LONGEST_PAUSE, 0.5 * 2**failed))


def _path(data: bytes) -> np.ndarray:
    with np.load(io.BytesIO(data)) as path:
        return path["c2w"]


def _alike(path: np.ndarray, other: np.ndarray) -> int:
    """How many poses two paths have in common from their beginning."""
    length = min(len(path), len(other))
    same = (path[:length] == other[:length]).all((1, 2))
    return length if same.all() else int(same.argmin())

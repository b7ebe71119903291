"""The one that knows of all videos, by itself: those who stop listening take nothing with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.serve import videos as videos_module
from longtake.serve.ledger import COMPLETED, FAILED, QUEUED, RUNNING, Record
from longtake.serve.searches import ATTEMPTS
from longtake.serve.videos import Videos

pytestmark = pytest.mark.cpu


async def videos(folder, decoder: Any = None) -> Any:
    """Of an application in which nothing is made, or what this decoder makes."""
    settings = SimpleNamespace(ledger=folder / "videos.sqlite", store=str(folder), max_running=1, stalled=0.3)
    settings.session_idle = 1.0
    made = Videos.func_or_class.__new__(Videos.func_or_class)
    await made.__init__(settings, None, decoder)
    return made


class Silent:
    """A decoder whose first streams give one frame, and then nothing."""

    def __init__(self, silent: int) -> None:
        self.asked, self.silent = 0, silent
        self.fragments = SimpleNamespace(remote=self._fragments)

    def options(self, **_: Any) -> Any:
        return self

    async def _fragments(self, task: Any) -> AsyncIterator[int]:
        self.asked += 1
        yield 1
        if self.asked <= self.silent:
            await asyncio.Event().wait()
        yield 25


def test_people_who_leave_while_they_listen_keep_nobody_from_being_told(tmp_path):
    async def crowd() -> int:
        made = await videos(tmp_path)
        made.ledger.add(Record("video_1", "anna", {"live": True}, 0, status=RUNNING))
        for turn in range(30):
            listening = [asyncio.create_task(made.watch("anna", "video_1", 0, 0.002 * n)) for n in range(8)]
            await asyncio.sleep(0.001 * (turn % 12))
            telling = [asyncio.create_task(made.end("anna", "video_1")) for _ in range(8)]
            for _ in range(3):  # a server may say it more than once
                for task in listening[::2]:
                    task.cancel()
                await asyncio.sleep(0)
            assert not (await asyncio.wait([*telling, *listening], timeout=20))[1], "somebody waits for ever"
        waiting = asyncio.create_task(made.watch("anna", "video_1", 0, 60))
        await asyncio.sleep(0.05)
        made.ledger.update("video_1", status=COMPLETED)
        await made.end("anna", "video_1")
        record, fragments = await asyncio.wait_for(waiting, 20)
        assert record.status == COMPLETED
        return fragments

    assert asyncio.run(crowd()) == 0


@pytest.mark.parametrize(("silent", "status"), [(2, COMPLETED), (100, FAILED)])
def test_a_video_whose_stages_fall_silent_is_begun_anew(tmp_path, monkeypatch, silent, status):
    monkeypatch.setattr(videos_module, "pause", lambda failed: asyncio.sleep(0))

    async def make() -> tuple[Record, int]:
        made = await videos(tmp_path, decoder := Silent(silent))
        made.results.put("video_1/text.safetensors", b"")
        made.ledger.add(Record("video_1", "anna", {"prompt": "", "seed": 0, "refine": False}, 25, status=QUEUED))
        made._waiting.append("video_1")
        made._start()
        record = await asyncio.wait_for(made.done("video_1"), 30)
        assert not made._tasks and not made._heard and not made._asking
        return record, decoder.asked

    record, asked = asyncio.run(make())
    assert record.status == status and asked == min(silent + 1, ATTEMPTS)


def test_a_session_that_waits_for_keys_is_not_one_that_fell_silent(tmp_path):
    async def make() -> int:
        made = await videos(tmp_path, decoder := Silent(1))
        made.results.put("video_1/text.safetensors", b"")
        request = {"prompt": "", "seed": 0, "refine": False, "live": True}
        made._opened(Record("video_1", "anna", request, 0, status=RUNNING))
        while not made._runs:
            await asyncio.sleep(0.01)
        assert await made.next("video_1", made._runs["video_1"], 0) is None  # after session_idle, more than `stalled`
        return decoder.asked

    assert asyncio.run(make()) == 1

"""The one that knows of all videos, by itself: those who stop listening take nothing with them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.serve.ledger import COMPLETED, RUNNING, Record
from longtake.serve.videos import Videos

pytestmark = pytest.mark.cpu


async def videos(folder) -> Any:
    """Of an application in which nothing is made."""
    settings = SimpleNamespace(ledger=folder / "videos.sqlite", store=str(folder), max_running=1)
    made = Videos.func_or_class.__new__(Videos.func_or_class)
    await made.__init__(settings, None, None)
    return made


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

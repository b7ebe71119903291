"""A stage's steps for their time alone: no checkpoint, no weights, no pictures."""

from __future__ import annotations

import json
from pathlib import Path

from longtake.platform.parallel.context import ContextParallel
from longtake.platform.train.feed import Source
from longtake.platform.train.loop import Worker
from longtake.platform.train.settings import Settings


def timed(settings: Settings, source: Source) -> None:
    """As `loop.train`, of a stage of the flow objective.

    Where workers share a clip, RUN/sent_R.json of rank R says what each block sent in its first forward pass, bytes by
    what they were for, and of how many bytes a number is in the dtype that it computes in.
    """
    worker = _Timed(settings, source)
    axis, sent = worker.objective.time_axis, None
    if isinstance(axis, ContextParallel):
        sent = axis.peers.noting([*worker.objective.get_submodule("world_model.blocks").children()])
    worker.run()
    worker.close()
    if sent is not None:
        itemsize = 2 if worker.device.type == "cuda" and settings.stage.dtype == "bfloat16" else 4
        noted = {"itemsize": itemsize, "sent": sent}
        Path(settings.folder, f"sent_{worker.rank}.json").write_text(json.dumps(noted))


class _Timed(Worker):
    def _save(self) -> None:
        self.saved_step = self.step

    def _write_results(self) -> None:
        pass

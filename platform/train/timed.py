"""A stage's steps for their time alone: no checkpoint, no weights, no pictures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

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
    worker.note_traffic()
    worker.run()
    worker.close()


class _Timed(Worker):
    def _save(self) -> None:
        self.saved_step = self.step

    def _write_results(self) -> None:
        pass

    def note_traffic(self) -> None:
        axis = self.objective.time_axis
        if not isinstance(axis, ContextParallel):
            return
        blocks = self.objective.get_submodule("world_model.blocks")
        sent: list[Counter[str]] = []
        itemsize = 2 if self.device.type == "cuda" and self.stage.dtype == "bfloat16" else 4
        noted = {"itemsize": itemsize, "sent": sent}

        def note(*_: Any) -> None:
            sent.append(Counter(axis.peers.sent))
            axis.peers.sent.clear()
            if len(sent) == len(hooks):
                for hook in hooks:
                    hook.remove()
                Path(self.settings.folder, f"sent_{self.rank}.json").write_text(json.dumps(noted))

        hooks = [block.register_forward_hook(note) for block in blocks.children()]

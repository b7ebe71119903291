"""metrics.jsonl: written by the first worker, followed on the screen by the process that started the run."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.platform.observe.progress import Progress
from longtake.platform.train.stages import Stage

NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records so far, a half-written last line left out."""
    path = folder / NAME
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """One JSON object a line: step, seconds, loss, the objective's metrics, lr, clips_per_second."""

    def __init__(self, folder: Path, stage: Stage, step: int) -> None:
        self.path, self.stage = folder / NAME, stage
        kept = [record for record in read(folder) if record["step"] <= step]  # a re-run takes the later steps again
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._step, self._time = step, time.monotonic()

    def write(self, step: int, values: dict[str, float], rate: float, seconds: float) -> None:
        """ValueError when the loss is not finite."""
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss is {values['loss']} at step {step}: lower learning_rate (now {self.stage.learning_rate}) "
                "with --set; run again to go on from the last checkpoint"
            )
        now = time.monotonic()
        speed = (step - self._step) * self.stage.batch_size / (now - self._time)
        record = {"step": step, "seconds": round(seconds, 2), **values, "lr": rate, "clips_per_second": round(speed, 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._step, self._time = step, now


@contextmanager
def shown(folder: Path, stage: Stage) -> Iterator[None]:
    """Show the run's progress on the screen while the block waits for it."""
    ended = threading.Event()

    def follow() -> None:
        old = max((record["step"] for record in read(folder)), default=0)
        progress = None
        while not ended.wait(1):
            for record in read(folder)[-1:]:
                if progress is None and record["step"] != old:  # the time until the first record is not a step's
                    progress = Progress(stage.steps, "steps", stage.name, initial=record["step"], interval=10)
                elif progress and record["step"] > progress.done:
                    figures = {name: record[name] for name in ("loss", "lr", "clips_per_second")}
                    progress.update(record["step"] - progress.done, **figures)
        if progress:
            progress.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

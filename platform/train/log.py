"""metrics.jsonl: written by the first worker, followed on the screen by the process that started the run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.platform.observe import notices
from longtake.platform.observe.measurements import peak_memory
from longtake.platform.observe.progress import Progress
from longtake.platform.train.stages import Stage

NAME = "metrics.jsonl"
NOTICES = "notices.txt"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records so far, a half-written last line left out."""
    path = folder / NAME
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """One JSON object a line: step, seconds, loss and the objective's metrics of the last update that was made, skipped
    (updates since the last record that were not, for gradients that are not finite), lr, clips_per_second, and of a GPU
    tokens_per_second of one worker, mfu (share of its peak FLOP/s that the model's own FLOPs take), data_wait (share of
    the time that the first worker waits for its batches) and memory_gib (its peak so far).
    """

    def __init__(self, folder: Path, stage: Stage, step: int, clip_tokens: float = 0, clip_seconds: float = 0) -> None:
        """clip_tokens: latent tokens of a clip over the number of workers, clip_seconds: what a clip takes all of them
        at their peak; 0 where it is unknown.
        """
        self.path, self.stage = folder / NAME, stage
        self.clip_tokens, self.clip_seconds = clip_tokens, clip_seconds
        kept = [record for record in read(folder) if record["step"] <= step]  # a re-run takes the later steps again
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._step, self._time = step, time.monotonic()

    def write(self, step: int, values: dict[str, float], rate: float, seconds: float, waited: float = 0) -> None:
        """waited: seconds spent on waiting for batches since the last call."""
        now = time.monotonic()
        elapsed = now - self._time
        speed = (step - self._step) * self.stage.batch_size / elapsed
        record = {
            "step": step,
            "seconds": round(seconds, 2),
            **values,
            "lr": rate,
            "clips_per_second": float(f"{speed:.4g}"),
        }
        if self.clip_tokens:
            record["tokens_per_second"] = round(speed * self.clip_tokens)
        if self.clip_seconds:
            record["mfu"] = round(speed * self.clip_seconds, 4)
        record |= {"data_wait": round(waited / elapsed, 4), "memory_gib": round(peak_memory() / 2**30, 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._step, self._time = step, now


@contextmanager
def shown(folder: Path, stage: Stage, send: Callable[[dict[str, Any]], None] | None = None) -> Iterator[None]:
    """Show the run's progress and notices on the screen while the block waits for it, and `send` every new record."""
    ended = threading.Event()
    (folder / NOTICES).unlink(missing_ok=True)
    old = max((record["step"] for record in read(folder)), default=0)

    def follow() -> None:
        progress, sent, last = None, old, False
        while not last:
            last = ended.wait(1)
            for line in notices.read(folder / NOTICES):
                notices.say(line)
            records = read(folder)
            for record in records:
                if send and record["step"] > sent:
                    send(record)
                    sent = record["step"]
            for record in records[-1:]:
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

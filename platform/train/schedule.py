"""The learning rate as a function of progress, progress in steps or in time, and notices that time is up."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from longtake.platform.train.stages import Stage


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """Rate of 0-based `step`: linear warm-up over `stage.warmup` steps, times the schedule at `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / stage.warmup) if stage.warmup else 1.0
    factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if stage.schedule == "cosine" else 1.0
    return stage.learning_rate * warm * factor


NOTICE = "LONGTAKE_NOTICE"  # in the environment of a machine: a file that appears when it is about to be taken away


class Clock:
    """Progress of a run: max(step / steps, elapsed / max_seconds), the same number on every worker.

    seconds: time spent in earlier runs of the same command. With several workers rank 0's clock counts, and is asked
    every `every` steps only, since asking makes workers wait for each other; where a step takes a second, every step.
    noticed: whether a worker's machine is about to be taken away, true for one tick.
    """

    def __init__(self, steps: int, max_seconds: float | None, seconds: float = 0.0, every: int = 10) -> None:
        self.steps, self.max_seconds, self.every = steps, max_seconds, every
        self._shared = dist.is_initialized() and dist.get_world_size() > 1
        self._start = time.monotonic() - seconds
        self.agreed = seconds
        self.noticed = False
        self._notice = Path(os.environ[NOTICE]) if os.environ.get(NOTICE) else None
        self._asked, self._next = 0, 0

    def now(self) -> float:
        """Seconds since the run began, by this worker's own clock."""
        return time.monotonic() - self._start

    def tick(self, step: int) -> float:
        """Seconds that all workers agree on, for the decisions before `step`."""
        self.noticed = False
        if step < self._next:
            return self.agreed
        before, seconds, notice = self.agreed, self.now(), self._newly_noticed()
        if self._shared:
            own = [seconds if dist.get_rank() == 0 else 0.0, float(notice)]
            agreed = torch.tensor(own, dtype=torch.float64, device=_collective_device())
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            seconds, notice = agreed[0].item(), bool(agreed[1])
            slow = seconds - before >= step - self._asked
            self._asked, self._next = step, step + (1 if slow else self.every)
        self.agreed, self.noticed = seconds, notice
        return self.agreed

    def _newly_noticed(self) -> bool:
        if self._notice is None or not self._notice.exists():
            return False
        self._notice = None
        return True

    def progress(self, step: int) -> float:
        """In [0, 1] and beyond when the time limit has passed; uses the last `tick`."""
        in_time = self.agreed / self.max_seconds if self.max_seconds else 0.0
        return max(step / self.steps, in_time)


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"

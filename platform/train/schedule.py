"""The learning rate as a function of progress, and progress in steps or in time."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist

from longtake.platform.train.stages import Stage


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """Rate of 0-based `step`: linear warm-up over `stage.warmup` steps, times the schedule at `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / stage.warmup) if stage.warmup else 1.0
    factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if stage.schedule == "cosine" else 1.0
    return stage.learning_rate * warm * factor


class Clock:
    """Progress of a run: max(step / steps, elapsed / max_seconds), the same number on every worker.

    seconds: time spent in earlier runs of the same command. With several workers rank 0's clock counts, and is asked
    every `every` steps only, since asking makes workers wait for each other.
    """

    def __init__(self, steps: int, max_seconds: float | None, seconds: float = 0.0, every: int = 10) -> None:
        self.steps, self.max_seconds, self.every = steps, max_seconds, every
        self._shared = dist.is_initialized() and dist.get_world_size() > 1
        self._start = time.monotonic() - seconds
        self.agreed = seconds

    def now(self) -> float:
        """Seconds since the run began, by this worker's own clock."""
        return time.monotonic() - self._start

    def tick(self, step: int) -> float:
        """Seconds that all workers agree on, for the decisions before `step`."""
        if not self._shared:
            self.agreed = self.now()
        elif step % self.every == 0:
            agreed = torch.tensor([self.now()], dtype=torch.float64, device=_collective_device())
            dist.broadcast(agreed, src=0)
            self.agreed = agreed.item()
        return self.agreed

    def progress(self, step: int) -> float:
        """In [0, 1] and beyond when the time limit has passed; uses the last `tick`."""
        in_time = self.agreed / self.max_seconds if self.max_seconds else 0.0
        return max(step / self.steps, in_time)


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"

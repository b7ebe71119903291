"""Which samples make which batch: a pure function of (seed, samples drawn so far)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """Endless order over `num_rows` clips: each epoch draws every clip `per_row` times, a new permutation an epoch.

    Sample n belongs to epoch n // (num_rows per_row). Neither workers nor batch size enter, so the samples of a global
    batch are the same however many workers share it.
    """

    num_rows: int
    seed: int
    per_row: int = 1

    @property
    def epoch_size(self) -> int:
        return self.num_rows * self.per_row

    def rows(self, start: int, count: int) -> np.ndarray:
        """int64 (count,): the clips of samples start ... start + count - 1."""
        samples = np.arange(start, start + count)
        epochs, within = np.divmod(samples, self.epoch_size)
        rows = np.empty(count, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = _permutation(self.num_rows, self.seed, epoch)[within[here] // self.per_row]
        return rows

    def generator(self, sample: int) -> np.random.Generator:
        """The random numbers that belong to one sample (which window, for example)."""
        return np.random.default_rng((self.seed, 1, sample))


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_rows)


@dataclass(frozen=True)
class Share:
    """One worker's part of every global batch: its micro-batch k is number k workers + rank of all micro-batches."""

    rank: int
    workers: int
    micro: int

    def start(self, number: int) -> int:
        """First sample of this worker's micro-batch `number`."""
        return (number * self.workers + self.rank) * self.micro

"""Which samples make which batch: a pure function of (seed, samples drawn so far)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

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
class Mixture:
    """Which of several corpora each sample comes from: of every `BLOCK` samples, each corpus gets its exact share.

    weights: in any unit, one a corpus. Like `Order` a function of the sample's number alone.
    """

    weights: tuple[float, ...]
    seed: int
    BLOCK: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"the weights of corpora must be positive numbers, not {self.weights}")
        if not min(self._counts):
            least = sum(self.weights) / self.BLOCK
            raise ValueError(f"weight {min(self.weights):g} of a corpus is too small: give at least {least:g}")

    @property
    def _counts(self) -> np.ndarray:
        """Samples of each corpus in a block, by largest remainder."""
        exact = self.BLOCK * np.asarray(self.weights) / sum(self.weights)
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: self.BLOCK - counts.sum()]] += 1
        return counts

    def parts(self, start: int, count: int) -> list[tuple[int, np.ndarray]]:
        """For each corpus the number of its first sample among `count` from `start`, and their places in the batch."""
        counts = self._counts
        first, corpora = np.zeros(len(counts), int), []
        for block in range(start // self.BLOCK, (start + count - 1) // self.BLOCK + 1):
            generator = np.random.default_rng((self.seed, 2, block))
            order = generator.permutation(np.repeat(np.arange(len(counts)), counts))
            begin = max(start - block * self.BLOCK, 0)
            if not corpora:
                first = block * counts + np.bincount(order[:begin], minlength=len(counts))
            corpora.append(order[begin : start + count - block * self.BLOCK])
        chosen = np.concatenate(corpora)
        return [(int(first[corpus]), np.flatnonzero(chosen == corpus)) for corpus in range(len(counts))]


@dataclass(frozen=True)
class Share:
    """One worker's part of every global batch: its micro-batch k is number k workers + rank of all micro-batches."""

    rank: int
    workers: int
    micro: int

    def start(self, number: int) -> int:
        """First sample of this worker's micro-batch `number`."""
        return (number * self.workers + self.rank) * self.micro

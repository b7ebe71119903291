"""Flow matching chunk by chunk: chunks start one after another, each at its own sigma, and leave when they are clean
(SANA-WM sections 3.2, 3.3 and 4.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.model.samplers.flow_euler import clip_noise, euler_step, frame_timesteps, shift_sigma

# Shares of the ways in which the sigmas of a training clip's chunks go together.
_ALIKE, _RISING, _RISING_TO_LAST = 0.1, 0.4, 0.4  # the rest has clean chunks before noisy ones


def chunk_training_sigma(normal: Tensor, way: Tensor, place: Tensor, others: Tensor, shift: float) -> Tensor:
    """Shifted sigmas (B, chunks) of training clips, from standard normal numbers (B,) and uniform ones: `way` and
    `place` (B,), `others` (B, chunks).

    One chunk's is logit-normal, and the others are: the same; or a uniform draw of what does not fall from chunk to
    chunk and has the first one's at a random place, or at the last; or the same after a random number of clean chunks,
    of sigma 0. What a chunk-causal sampler meets is among them. The published mixture; it draws whole timesteps, here
    sigma is continuous, before its shift.
    """
    count = others.shape[1]
    chunk, anchor = torch.arange(count, device=others.device), normal.sigmoid()[:, None]
    way, random_place = way[:, None], (place[:, None] * count).long()
    at = torch.where(way < _ALIKE + _RISING, random_place, count - 1)
    around = torch.where(chunk < at, anchor * others, anchor + (1 - anchor) * others)
    rising = torch.where(chunk == at, anchor, around).sort(1).values  # uniform numbers in order are such a draw
    clean = (1 + (place[:, None] * (count - 1)).long()).clamp(max=count - 1)
    sigma = torch.where(way < _ALIKE + _RISING + _RISING_TO_LAST, rising, anchor * (chunk >= clean))
    return shift_sigma(torch.where(way < _ALIKE, anchor, sigma), shift)


def chunk_noise(
    shape: Sequence[int], seeds: Sequence[int], chunk: int, device: torch.device | str, step: int = 0
) -> Tensor:
    """Unit noise (len(seeds), *shape) that depends on a clip's seed, the chunk's number and the step's alone."""
    which = (chunk, step) if step else (chunk,)
    mixed = (np.random.SeedSequence((seed % 2**64, *which)).generate_state(1)[0] for seed in seeds)
    return clip_noise(shape, [int(seed) for seed in mixed], device)


class ChunkNetwork(Protocol):
    """A network that goes on from the chunks it has kept."""

    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of the chunks of `sizes` frames that follow the kept ones: x (B, C, T, h, w), timestep (B, T)."""
        ...

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        """The chunks that follow are clean, x; what comes next follows them."""
        ...


@dataclass
class _Chunk:
    x: Tensor
    frozen: int  # first frames, clean from the beginning
    step: int = 0

    def timestep(self, sigmas: Sequence[float]) -> Tensor:
        return frame_timesteps(self.x, sigmas[self.step], self.frozen)

    def move(self, velocity: Tensor, sigmas: Sequence[float], fresh: Callable[[int], Tensor] | None) -> None:
        noise = fresh(self.step + 1) if fresh and self.step + 2 < len(sigmas) else None
        self.x = euler_step(self.x, velocity, sigmas[self.step], sigmas[self.step + 1], self.frozen, noise)
        self.step += 1


def chunk_flow_euler(
    network: ChunkNetwork,
    noise: Callable[[int, int], Tensor],
    sizes: Sequence[int],
    sigmas: Sequence[float],
    interval: float | None = None,
    start: Tensor | None = None,
    fresh: Callable[[int, int, int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The clean chunks (B, C, T, h, w), float32, as they are done, each before it is kept; the last one is not.

    noise(chunk, frames): what a chunk starts from. interval: how much of its steps a chunk is ahead of the next one: by
    1 they are made one after another, by default all at once, each a little cleaner than the next. Chunks that are done
    are not computed again. start (B, C, f, h, w): clean first frames of the first chunk. fresh(chunk, frames, step):
    new noise for a step, as in `euler`.
    """
    steps = len(sigmas) - 1
    interval = 1 / len(sizes) if interval is None else interval
    begins = [int(chunk * interval * steps) for chunk in range(len(sizes))]
    flying: deque[_Chunk] = deque()
    begun = done = now = 0
    while done < len(sizes):
        while begun < len(sizes) and begins[begun] <= now:
            x, frozen = noise(begun, sizes[begun]).clone(), 0
            if begun == 0 and start is not None:
                frozen = start.shape[2]
                x[:, :, :frozen] = start
            flying.append(_Chunk(x, frozen))
            begun += 1
        if flying:
            here = sizes[done:begun]
            timestep = torch.cat([chunk.timestep(sigmas) for chunk in flying], 1)
            velocity = network.velocity(torch.cat([chunk.x for chunk in flying], 2), timestep, here)
            for number, (chunk, part) in enumerate(zip(flying, velocity.split(list(here), 2), strict=True), done):
                chunk.move(part, sigmas, fresh and partial(fresh, number, part.shape[2]))
        while flying and flying[0].step == steps:
            x, size = flying.popleft().x, sizes[done]
            done += 1
            yield x
            if done < len(sizes):
                network.keep(x, [size])
        now += 1

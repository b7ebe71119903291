"""Random numbers that belong to a clip: whichever batch, worker or micro-batch it is in, it draws the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class Draws:
    """The random numbers of a batch, a generator a clip: draws are functions of seed and the clip's number alone.

    numbers: of the clips, in the order of the batch, each its place in the whole run. A draw costs a small launch a
    clip, and the host waits for none. step: of the training that the batch is for.
    """

    def __init__(self, seed: int, numbers: Iterable[int], device: torch.device | str = "cpu", step: int = 0) -> None:
        self.device, self._of_step = torch.device(device), random.Random(seed * 1_000_003 + step)
        self._generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + number) for number in numbers]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape), float32."""
        return self._filled(Tensor.normal_, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), (B, *shape), float32."""
        return self._filled(Tensor.uniform_, shape)

    def common(self, count: int) -> int:
        """A number below `count` that all clips of a step draw alike, on every worker."""
        return self._of_step.randrange(count)

    def noise(self, shape: Sequence[int], frames: Tensor | None = None) -> Tensor:
        """`normal` of shape (C, T, h, w); of a clip padded to T, its own `frames` (B,) as it draws them alone, then
        zeros. The host waits for what `frames` says.
        """
        if frames is None:
            return self.normal(*shape)
        channels, _, *area = shape
        out = torch.zeros(len(self._generators), *shape, device=self.device)
        for clip, generator, count in zip(out.unbind(), self._generators, frames.tolist(), strict=True):
            clip[:, :count] = torch.empty(channels, count, *area, device=self.device).normal_(generator=generator)
        return out

    def _filled(self, fill: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(len(self._generators), *shape, device=self.device)
        for clip, generator in zip(out.unbind(), self._generators, strict=True):
            fill(clip, generator=generator)
        return out

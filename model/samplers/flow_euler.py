"""Flow matching: the time shift, training times, and Euler integration (SANA-WM sections 3.1, 3.4 and 4.2).

x_sigma = (1 - sigma) x0 + sigma noise; a model predicts the velocity v = noise - x0; sigma runs from 1 (noise) to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtake.model.config import SamplerConfig
from longtake.model.sent import sent


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(num_steps: int, shift: float) -> Tensor:
    """`num_steps + 1` shifted sigmas from 1 down to 0, float32."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: at least 1 step is needed")
    return shift_sigma(torch.linspace(1, 0, num_steps + 1), shift)


def sampler_sigmas(sampler: SamplerConfig, num_steps: int | None = None) -> Tensor:
    """The sigmas that weights were made for, float32, from the first step's to 0; of other steps if they allow it."""
    if not sampler.timesteps:
        return schedule(num_steps or sampler.num_steps, sampler.shift)
    if num_steps not in (None, sampler.num_steps):
        raise ValueError(
            f"these weights were distilled to {sampler.num_steps} steps, they make nothing in {num_steps}: leave it out"
        )
    return torch.tensor(sampler.timesteps) / 1000


def trajectory_sigmas(sigmas: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """The falling `sigmas` with the falling `levels` among them, cut after each level: from levels[0], which is the
    first sigma, to the next, ..., and from the last level to 0.
    """
    ends, runs = [*levels, 0.0], []
    for high, low in pairwise(ends):
        between = [sigma for sigma in sigmas.tolist() if low + 1e-3 < sigma < high - 1e-3]
        runs.append(torch.tensor([high, *between, low]))
    return runs


def training_sigma(normal: Tensor, shift: float) -> Tensor:
    """Logit-normal(0, 1) sigmas from standard normal numbers, shifted."""
    return shift_sigma(normal.sigmoid(), shift)


def clip_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str) -> Tensor:
    """Unit noise (len(seeds), *shape): one CPU generator a clip, so a clip's noise depends on nothing but its seed."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return sent(torch.stack(noise), device)


def frame_timesteps(x: Tensor, sigma: float, frozen_frames: int = 0) -> Tensor:
    """1000 sigma for every frame of x (B, C, T, h, w), 0 for the first, frozen ones: (B, T)."""
    timestep = torch.full((x.shape[0], x.shape[2]), 1000 * sigma, device=x.device)
    timestep[:, :frozen_frames] = 0
    return timestep


def euler_step(
    x: Tensor, velocity: Tensor, sigma: float, following: float, frozen_frames: int = 0, noise: Tensor | None = None
) -> Tensor:
    """x, whose sigma was the first, at the following one; the first `frozen_frames` do not change. noise: in place of
    what the velocity takes for the noise in x.
    """
    update = (following - sigma) * velocity.float()
    if noise is not None:
        update = (1 - following) * (x - sigma * velocity.float()) + following * noise - x
    update[:, :, :frozen_frames] = 0
    return x + update


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    frozen_frames: int = 0,
    progress: Callable[[int, int], None] | None = None,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrate dx = v dsigma from sigmas[0] to sigmas[-1].

    velocity(x, timestep (B, T)) with timestep = 1000 sigma; the first `frozen_frames` latent frames have timestep 0 and
    never change. x: (B, C, T, h, w), float32. progress(step, steps) is called after each step. fresh(step): noise like
    x, new for each step that is to start with some.
    """
    steps = len(sigmas) - 1
    for step in range(steps):
        sigma, following = float(sigmas[step]), float(sigmas[step + 1])
        noise = fresh(step + 1) if fresh and step + 1 < steps else None
        v = velocity(x, frame_timesteps(x, sigma, frozen_frames))
        x = euler_step(x, v, sigma, following, frozen_frames, noise)
        if progress:
            progress(step + 1, steps)
    return x

"""Self-forcing: the few-step rollout as training makes it, every chunk after what the network itself made of the ones
before (SANA-WM sections 3.3 and 4.5, after Self Forcing, arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longtake.model.samplers.chunk_flow import ChunkNetwork
from longtake.model.samplers.flow_euler import frame_timesteps


class TrainedNetwork(ChunkNetwork, Protocol):
    def trained_velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `velocity`, with gradients."""
        ...


def self_forcing(
    network: TrainedNetwork,
    noise: Callable[[int], Tensor],
    sizes: Sequence[int],
    sigmas: Sequence[float],
    last: int,
    start: Tensor,
) -> Tensor:
    """Clean latents (B, C, T, h, w) of all chunks, each denoised at sigmas[0], ..., sigmas[last], and with fresh noise
    on what that made of it in between. Gradients go through the pass at sigmas[last] alone, where they are enabled.

    noise(frames): fresh, (B, C, frames, h, w). start (B, C, f, h, w): clean first frames of the first chunk, which have
    no gradient.
    """
    made = []
    for chunk, size in enumerate(sizes):
        frozen = 0 if chunk else start.shape[2]
        clean = x = torch.cat([start, noise(size)[:, :, frozen:]], 2) if frozen else noise(size)
        for step, sigma in enumerate(sigmas[: last + 1]):
            if step:
                x = (1 - sigma) * clean + sigma * noise(size)  # as `euler` does with fresh noise
                x[:, :, :frozen] = clean[:, :, :frozen]
            velocity = network.trained_velocity if step == last else network.velocity
            clean = x - sigma * velocity(x, frame_timesteps(x, sigma, frozen), [size]).float()
            if frozen:
                clean = torch.cat([start, clean[:, :, frozen:]], 2)
        network.keep(clean.detach(), [size])
        made.append(clean)
    return torch.cat(made, 2)

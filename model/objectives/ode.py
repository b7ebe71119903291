"""The few-step network's first lesson: the teacher's own trajectories."""

from __future__ import annotations

from typing import Any

import torch

from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes, each_frame
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.objective import Batch, Loss


class ODEObjective(FlowObjective):
    """From a place on a trajectory of the teacher's, what it ends in (SANA-WM section 4.5).

    Every chunk is at one of the sampler's timesteps or at the clean end, drawn by itself; the first frame is the clean
    image. clean_history: in this share of the clips all chunks before a random one are clean, as the sampler's are.
    history_noise: up to so much noise, beside latents of unit scale, lies on what is clean of a clip after its first
    frame, for a network that goes on from its own chunks meets flaws there (GameNGen, arXiv 2408.14837). The loss is
    the mean square of x0 = x - sigma v beside the trajectory's end, over a clip's frames that are not clean. batch: as
    of `FlowObjective`, and noisy (B, K, C, T, h, w), the trajectory at the sampler's K timesteps; latents are its end.
    """

    def __init__(
        self, config: WorldModelConfig, clean_history: float = 0.0, history_noise: float = 0.0, **options: Any
    ):
        super().__init__(config, **options)
        self.clean_history, self.history_noise = clean_history, history_noise

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        noisy, clean = batch["noisy"].float(), batch["latents"].float()
        steps, frames = noisy.shape[1], clean.shape[2]
        sizes = chunk_sizes(frames, self.config.chunk_size)
        chosen = self._chosen(len(sizes), steps, draws)
        chosen = each_frame(chosen, sizes)
        chosen[:, 0] = steps
        sigma = torch.tensor([*self.config.sampler.timesteps[:-1], 0], device=clean.device)[chosen] / 1000
        at = chosen[:, None, None, :, None, None].expand(-1, 1, *clean.shape[1:])
        x = torch.cat([noisy, clean[:, None]], 1).gather(1, at)[:, 0]
        if self.history_noise:
            level = self.history_noise * draws.uniform()[:, None] * (sigma == 0)
            level[:, 0] = 0
            x = x + level[:, None, :, None, None] * draws.normal(*clean.shape[1:])
        text, mask = self.encode_text(batch, draws)
        axis = ChunkCausal(sizes, self.config.chunk_window)
        velocity = self.world_model(x, 1000 * sigma, text, mask, self.camera(batch), axis).float()
        error = (x - sigma[:, None, :, None, None] * velocity - clean).square().mean((1, 3, 4))
        learnt = (sigma > 0).float()
        return ((error * learnt).sum(1) / learnt.sum(1).clamp(min=1)).mean(), {}

    def _chosen(self, chunks: int, steps: int, draws: Draws) -> torch.Tensor:
        """Where each chunk (B, chunks) is on its trajectory of so many steps, at whose end the last number is."""
        chosen = (draws.uniform(chunks) * (steps + 1)).long()
        from_here = (draws.uniform() * chunks).long()
        follows = draws.uniform() < self.clean_history
        history = torch.arange(chunks, device=chosen.device) < from_here[:, None]
        return torch.where(follows[:, None] & history, steps, chosen)


OBJECTIVE = ODEObjective

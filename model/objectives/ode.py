"""The few-step network's first lesson: the teacher's own trajectories."""

from __future__ import annotations

import torch

from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes, each_frame
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.objective import Batch, Loss


class ODEObjective(FlowObjective):
    """From a place on a trajectory of the teacher's, what it ends in (SANA-WM section 4.5).

    Every chunk is at one of the sampler's timesteps, drawn by itself; the first frame is the clean image. The loss is
    the mean square of x0 = x - sigma v beside the trajectory's end, over frames that are not clean. batch: as of
    `FlowObjective`, and noisy (B, K, C, T, h, w), the trajectory at the sampler's K timesteps; latents are its end.
    """

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        noisy, clean = batch["noisy"].float(), batch["latents"].float()
        steps, frames = noisy.shape[1], clean.shape[2]
        sizes = chunk_sizes(frames, self.config.chunk_size)
        chosen = each_frame((draws.uniform(len(sizes)) * steps).long(), sizes)
        sigma = torch.tensor(self.config.sampler.timesteps, device=clean.device)[chosen] / 1000
        sigma[:, 0] = 0
        at = chosen[:, None, None, :, None, None].expand(-1, 1, *clean.shape[1:])
        x = torch.cat([clean[:, :, :1], noisy.gather(1, at)[:, 0, :, 1:]], 2)
        text, mask = self.encode_text(batch, draws)
        axis = ChunkCausal(sizes, self.config.chunk_window)
        velocity = self.world_model(x, 1000 * sigma, text, mask, self.camera(batch), axis).float()
        error = (x - sigma[:, None, :, None, None] * velocity - clean)[:, :, 1:].square().mean((1, 2, 3, 4))
        return error.mean(), {}


OBJECTIVE = ODEObjective

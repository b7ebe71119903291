"""The refiner's objective (stage 5)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.objective import Batch, Loss, Objective
from longtake.model.refiner import Refiner


class RefinerObjective(Objective):
    """Truncated-sigma flow matching (section 4.4) from stage-1 latents x_l to true latents x_h.

    x_1 = (1 - s) x_l + s noise; x_a = (1 - a) x_h + a x_1; the velocity is (x_1 - x_h) / s at timestep 1000 a s; s is
    the schedule's first sigma. x_l is what the frozen stage 1 makes of x_h noised to a random sigma. Batches as for
    `FlowObjective`.
    """

    def __init__(self, config: WorldModelConfig, stage1_steps: int = 4):
        super().__init__()
        self.config, self.stage1_steps = config, stage1_steps
        self.refiner = Refiner(config)
        self.stage1 = FlowObjective(config).requires_grad_(False)

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        target = batch["latents"].float()
        text, mask = self.stage1.encode_text(batch)
        first = self.config.refiner.sigmas[0]
        coarse = self.stage1_reconstruction(batch, draws)
        noise = draws.normal(*target.shape[1:])
        start = (1 - first) * coarse + first * noise
        along = draws.uniform()
        frame_along = along[:, None].repeat(1, target.shape[2])
        frame_along[:, 0] = 0
        level = frame_along[:, None, :, None, None]
        velocity = self.refiner((1 - level) * target + level * start, 1000 * first * frame_along, text, mask).float()
        error = (velocity - (start - target) / first)[:, :, 1:].square().mean()
        return error, {"coarse_mse": (coarse - target).square().mean()}

    @torch.no_grad()
    def stage1_reconstruction(self, batch: Batch, draws: Draws) -> Tensor:
        """Stage 1's x_l: each clip noised to a random sigma and denoised in a few steps."""
        target = batch["latents"].float()
        highest = draws.uniform() * 0.4 + 0.55
        level = highest[:, None, None, None, None]
        start = (1 - level) * target + level * draws.normal(*target.shape[1:])
        start[:, :, :1] = target[:, :, :1]
        return self.stage1.denoise(batch, start, torch.linspace(1, 0, self.stage1_steps + 1), highest)

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Draws) -> Tensor:
        """Refined stage-1 generations (B, C, T, h, w)."""
        coarse = self.stage1.sample(batch, draws)
        return self.refiner.refine(coarse, draws.normal(*coarse.shape[1:]), *self.stage1.encode_text(batch))

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        weights.save_part(self.refiner, folder, "refiner", dtype)

    def load(self, folder: Path) -> None:
        """The frozen stage 1 from `folder`; the refiner too where the folder has one."""
        self.stage1.load(folder)
        if (folder / "refiner").is_dir():
            weights.load_part(self.refiner, folder, "refiner")


OBJECTIVE = RefinerObjective

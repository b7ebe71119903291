"""The refiner's objective (stage 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import each_frame
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.objective import Batch, Loss, Objective
from longtake.model.refiner import Refiner, adapters
from longtake.model.refiner.refiner import SINK, block_sizes
from longtake.model.text import build_text_encoder


class RefinerObjective(Objective):
    """Truncated-sigma flow matching (section 4.4) from stage-1 latents x_l to true latents x_h.

    x_1 = (1 - s) x_l + s noise; x_a = (1 - a) x_h + a x_1; the velocity is (x_1 - x_h) / s at timestep 1000 a s; s is
    the schedule's first sigma. x_l is what the frozen stage 1 makes of x_h noised to a random sigma, or, with `pairs`,
    one of those that were made before, and there is no stage 1. A refiner of blocks sees the clean frames of the window
    before each block, whose `a` is its own. With a lora_rank, adapters of that rank are trained and
    their base is frozen, in `base_dtype`.

    Batches as for `FlowObjective`; of pairs, noisy (B, K, C, T, h, w), K versions x_l of each clip. Where the refiner's
    text_dim is not stage 1's, it reads captions its own way: refiner_text (B, L, D), refiner_text_mask bool (B, L).
    """

    def __init__(
        self, config: WorldModelConfig, stage1_steps: int = 4, pairs: bool = False, base_dtype: str = "float32"
    ):
        super().__init__()
        self.config, self.stage1_steps, self.pairs = config, stage1_steps, pairs
        self.adapted = config.refiner.lora_rank > 0
        with _default_dtype(getattr(torch, base_dtype) if self.adapted else torch.float32):
            self.refiner = Refiner(config)
        if self.adapted:
            adapters.attach(self.refiner.transformer, config.refiner.lora_rank)
            self.frozen_from = ""
        self.stage1 = None if pairs else FlowObjective(config).requires_grad_(False)
        self.text = None
        if pairs and not config.text.frozen and not config.refiner_reads_own_text:
            self.text = build_text_encoder(config).requires_grad_(False)

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        target = batch["latents"].float()
        text, mask = self.encode_text(batch)
        first = self.config.refiner.sigmas[0]
        coarse = self.coarse(batch, draws)
        noise = draws.normal(*target.shape[1:])
        start = (1 - first) * coarse + first * noise
        along = self._along(target.shape[2], draws)
        level, timestep = along[:, None, :, None, None], 1000 * first * along
        noisy = (1 - level) * target + level * start
        if self.config.refiner.block_size is None:
            velocity = self.refiner(noisy, timestep, text, mask).float()
        else:
            velocity = self.refiner.by_blocks(target, noisy, timestep, text, mask).float()
        error = (velocity - (start - target) / first)[:, :, 1:].square().mean()
        return error, {"coarse_mse": (coarse - target).square().mean()}

    def _along(self, frames: int, draws: Draws) -> Tensor:
        """How far each frame (B, T) is from clean to where refining starts: 0 of the first one, the same of a block."""
        size = self.config.refiner.block_size
        if size is None:
            along = draws.uniform()[:, None].repeat(1, frames)
            along[:, :SINK] = 0
            return along
        sizes = block_sizes(frames - SINK, size)
        along = each_frame(draws.uniform(len(sizes)), sizes)
        return torch.cat([torch.zeros_like(along[:, :SINK]), along], 1)

    def encode_text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the refiner reads of captions: features and mask. ValueError when the batch lacks its own features."""
        if self.config.refiner_reads_own_text:
            if "refiner_text" not in batch:
                raise ValueError(
                    f"the refiner reads features of captions that are {self.config.refiner.text_dim} wide, and the "
                    "batch has none (refiner_text): encode its captions with the refiner's text encoder"
                )
            return batch["refiner_text"].float(), batch["refiner_text_mask"]
        if self.stage1 is not None:
            return self.stage1.encode_text(batch)
        mask = batch["tokens_mask"]
        return (batch["text"].float() if self.text is None else self.text(batch["tokens"], mask)), mask

    def coarse(self, batch: Batch, draws: Draws) -> Tensor:
        """x_l: of a clip's stored versions one that is drawn, or stage 1's from a random sigma."""
        if self.stage1 is None:
            noisy = batch["noisy"]
            chosen = (draws.uniform() * noisy.shape[1]).long()
            return noisy[torch.arange(len(noisy), device=noisy.device), chosen].float()
        return self.stage1.reconstruct(batch, draws, draws.uniform() * 0.4 + 0.55, self.stage1_steps)

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Draws) -> Tensor:
        """Refined stage-1 generations (B, C, T, h, w), or, of pairs, the refined first of a clip's versions."""
        coarse = batch["noisy"][:, 0].float() if self.stage1 is None else self.stage1.sample(batch, draws)
        return self.refiner.refine(coarse, draws.normal(*coarse.shape[1:]), *self.encode_text(batch))

    @property
    def exported(self) -> nn.Module:
        return adapters.trained(self.refiner.transformer) if self.adapted else self.refiner

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        if self.adapted:
            adapters.save(self.refiner.transformer, folder, self.frozen_from or "", dtype)
        else:
            weights.save_part(self.refiner, folder, "refiner", dtype)

    def load(self, folder: Path) -> None:
        """The frozen stage 1 from `folder`; the refiner too where the folder has one."""
        parts = ("dit", "text", "refiner") if (folder / weights.FOLDERS["refiner"]).is_dir() else ("dit", "text")
        self.start(dict.fromkeys(parts, folder))

    def start(self, parts: Mapping[str, Path]) -> None:
        if self.stage1 is not None and "dit" in parts:
            self.stage1.load(parts["dit"])
        if self.text is not None and "text" in parts:
            weights.load_part(self.text, parts["text"], "text")
        if "refiner" in parts:
            self._start_refiner(parts["refiner"])

    def _start_refiner(self, folder: Path) -> None:
        """From a refiner and the adapters beside it, which training goes on with where it is of adapters."""
        weights.load_part(self.refiner, folder, "refiner")
        if not self.adapted:
            adapters.merge_beside(self.refiner.transformer.state_dict(), folder)
            return
        place = folder / weights.FOLDERS["refiner"]
        self.frozen_from = weights.digest(place)
        if (folder / weights.ADAPTERS).is_dir():
            found = adapters.read(folder)
            adapters.check_base(found, self.frozen_from, str(place))
            adapters.load(self.refiner.transformer, found)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is built inside has parameters of this dtype: a large base is never there in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OBJECTIVE = RefinerObjective

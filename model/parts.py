"""The parts of a pipeline: which there are, made with random weights, and made ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from longtake.model import float8, weights
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel
from longtake.model.refiner import Refiner
from longtake.model.refiner.text import RefinerTextEncoder
from longtake.model.text import build_text_encoder
from longtake.model.vae import build_vae

Part = TypeVar("Part", bound=nn.Module)

PARTS = ("text", "vae", "dit", "refiner")
ROUNDED = {"dit", "refiner"}  # those with products that a quantization is of


def parts_of(config: WorldModelConfig) -> tuple[str, ...]:
    """All parts that a video of this model goes through."""
    return (*PARTS, "refiner_text") if config.refiner_reads_own_text else PARTS


def build(part: str, config: WorldModelConfig, folder: Path | None = None) -> nn.Module:
    """One part with random weights (Gemma always comes with its own). ValueError for one that there is not."""
    if part == "text":
        return build_text_encoder(config, None if folder is None else str(folder))
    if part == "refiner_text" and folder is not None:
        return RefinerTextEncoder(folder / weights.REFINER_TEXT)
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
    return {"vae": build_vae, "dit": WorldModel, "refiner": Refiner}[part](config)


@torch.no_grad()
def ready(part: Part, dtype: torch.dtype, quantization: float8.Quantization | None = None) -> Part:
    """A part with final weights, in this dtype, those of large products rounded, and as kernels read them fastest."""
    nn.Module.to(part, dtype)  # diffusers' own `to` warns, even when nothing is to stay in float32
    if quantization is not None and isinstance(part, WorldModel | Refiner):
        float8.quantize(part)
    if isinstance(part, WorldModel):
        part.lay_out()
    return part

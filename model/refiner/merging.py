"""Adapters merged into a refiner on disk, and the result compared with the two apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longtake.model import weights
from longtake.model.checkpoint import load_safetensors, save_safetensors
from longtake.model.config import WorldModelConfig
from longtake.model.refiner import adapters
from longtake.model.refiner.adapters import Adapters
from longtake.model.refiner.refiner import Refiner

# Of the output's norm, by what the merged matrices are rounded to.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def write(base: Path, found: Adapters, out: Path, dtype: torch.dtype) -> None:
    """OUT/refiner: all tensors of BASE/refiner, those of another name than our network's too, with adapters merged."""
    place = weights.FOLDERS["refiner"]
    tensors = {name: x.float() if name in _layers(found) else x for name, x in load_safetensors(base / place).items()}
    adapters.merge(tensors, found)
    (out / place).mkdir(parents=True, exist_ok=True)
    save_safetensors(tensors, out / place / "model.safetensors", dtype)


@torch.no_grad()
def check(config: WorldModelConfig, base: Path, found: Adapters, out: Path) -> float:
    """|merged - apart| / |apart| of velocities of random latents, of OUT/refiner and of BASE/refiner with adapters
    attached. ValueError where that is more than what was written is rounded to.
    """
    refiner = weights.load_part(Refiner(config), base, "refiner")
    transformer = refiner.get_submodule("transformer")
    adapters.attach(transformer, found.rank, list(found.matrices))
    adapters.load(transformer, found)
    apart = _velocity(config, refiner)
    del refiner, transformer
    merged = _velocity(config, weights.load_part(Refiner(config), out, "refiner"))
    error = float((merged - apart).norm() / apart.norm())
    written = load_safetensors(out / weights.FOLDERS["refiner"])[next(iter(_layers(found)))].dtype
    if not error < _TOLERANCES[written]:
        raise ValueError(
            f"the merged refiner in {out} differs from base and adapters apart by {error:.1e}, more than "
            f"{_TOLERANCES[written]:.0e}: write it with --dtype float32"
        )
    return error


def _velocity(config: WorldModelConfig, refiner: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.latent_channels, 3, 4, 4, generator=generator)
    text = torch.randn(1, 8, config.refiner.text_dim, generator=generator)
    timestep = torch.tensor([[0.0, 500.0, 500.0]])
    return refiner(latents, timestep, text, torch.ones(1, 8, dtype=torch.bool)).float()


def _layers(found: Adapters) -> list[str]:
    return [f"{layer}.weight" for layer in found.matrices]

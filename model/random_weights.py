"""A pipeline of random weights, on its device from the start: what a machine can do, before weights are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.model import float8
from longtake.model.config import WorldModelConfig
from longtake.model.parts import ROUNDED, ready
from longtake.model.pipeline import Residency, WorldPipeline
from longtake.model.refiner.text import REFINER_TOKENS


def random_pipeline(
    config: WorldModelConfig,
    parts: Sequence[str],
    device: str | torch.device,
    residency: Residency = "all",
    quantization: float8.Quantization | None = None,
) -> WorldPipeline:
    """With these parts and quantization, as of `WorldPipeline.from_pretrained`, in bfloat16 on a GPU, else in float32.
    In place of text encoders, features are random.
    """
    if ROUNDED & set(parts):
        float8.check(quantization, device)
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    place = device if residency == "all" else torch.device("cpu")
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {}
    for part in parts:
        if part == "text":
            modules[part] = _RandomText(config.text.length, config.text_dim, device, dtype)
        elif part == "refiner_text":
            modules[part] = _RandomText(REFINER_TOKENS, config.refiner.text_dim, device, dtype)
        else:
            with place:
                modules |= WorldPipeline.from_config(config, device=place, parts=[part]).modules
            modules[part] = ready(modules[part], dtype, quantization)
    return WorldPipeline(config, modules, device, residency)


class _RandomText(nn.Module):
    def __init__(self, length: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.length, self.dim, self.device, self.dtype = length, dim, device, dtype

    def encode(self, captions: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        shape = len(captions), self.length
        features = torch.randn(*shape, self.dim, device=self.device, dtype=self.dtype)
        return features, torch.ones(shape, device=self.device)

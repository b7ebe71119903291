"""How many floating-point operations the world model takes, counted on its definition without computing any."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from longtake.model.camera import CameraFeatures
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel

# Dense bfloat16 matrix products, FLOP/s, from the makers' data sheets; by a part of torch's device name.
_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def forward_flops(config: WorldModelConfig, frames: int) -> int:
    """FLOPs (two for a multiplication with its addition) of one forward pass over one clip of `frames` latent frames.

    Matrix products, convolutions and attention of both branches; what is linear in the tokens is left out. The fused
    kernels, which skip work of the definition, are given its count. A training step takes three times as many.
    """
    rows, columns = config.latent_size
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}
    with FakeTensorMode(), torch.no_grad():
        model = WorldModel(config)
        camera = CameraFeatures(
            torch.empty(1, frames, 20), torch.empty(1, config.plucker_channels, frames, rows, columns)
        )
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(
                torch.empty(1, config.latent_channels, frames, rows, columns),
                torch.empty(1, frames),
                torch.empty(1, config.text.length, config.text_dim),
                torch.empty(1, config.text.length),
                camera,
            )
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """What `device` does in a second at most, or None where no data sheet is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)

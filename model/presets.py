"""The named configurations: `tiny`, shipped with its weights, and `sana-wm`, the public 2.66 B model; and of each the
`-streaming` form, which makes a video chunk by chunk in four steps each.
"""

from __future__ import annotations

import dataclasses
import difflib

from longtake.model.config import RefinerConfig, SamplerConfig, TextConfig, WorldModelConfig

SANA_WM = WorldModelConfig()

SANA_WM_STREAMING = dataclasses.replace(
    SANA_WM,
    name="sana-wm-streaming",
    chunk_causal=True,
    chunk_window=1,
    sampler=SamplerConfig(4, 8.0, 1.0, timesteps=(1000, 960, 889, 727, 0), chunk_interval=1),
    refiner=RefinerConfig(block_size=3),
    vae=dict(decoder_causal=True),
)

TINY = WorldModelConfig(
    name="tiny",
    depth=8,
    hidden_size=192,
    num_heads=6,
    head_dim=32,
    mlp_ratio=2.0,
    text_dim=128,
    softmax_dtype="float32",
    contractive_gdn=True,
    image_size=(192, 320),
    sampler=SamplerConfig(num_steps=20, shift=4.0, guidance_scale=1.0),
    text=TextConfig(kind="bytes", length=96, dim=128, depth=2),
    refiner=RefinerConfig(
        num_layers=3, num_heads=3, head_dim=48, text_dim=128, lora_rank=0, sigmas=(0.4, 0.25, 0.12, 0.0)
    ),
    vae=dict(
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=(0, 1, 0, 0, 1),
        decoder_block_out_channels=(64, 64, 128),
        decoder_layers_per_block=(2, 1, 1, 0),
        upsample_factor=(1, 1, 2),
        decoder_spatial_padding_mode="zeros",
    ),
)

TINY_STREAMING = dataclasses.replace(
    TINY,
    name="tiny-streaming",
    chunk_causal=True,
    chunk_window=1,
    # The quarter points of its schedule.
    sampler=SamplerConfig(4, 4.0, 1.0, timesteps=(1000, 923, 800, 571, 0), chunk_interval=1, fresh_noise=True),
)

_PRESETS = {config.name: config for config in (TINY, TINY_STREAMING, SANA_WM, SANA_WM_STREAMING)}


def names() -> list[str]:
    """Names of all presets."""
    return list(_PRESETS)


def get(name: str) -> WorldModelConfig:
    """The configuration called `name`; ValueError with the nearest name when there is none."""
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}{hint}")
    return _PRESETS[name]

"""A world model small enough to build in every test: all parts, random weights."""

import pytest

from longtake.model.config import RefinerConfig, SamplerConfig, TextConfig, WorldModelConfig


def small_config() -> WorldModelConfig:
    return WorldModelConfig(
        name="small",
        depth=4,
        hidden_size=64,
        num_heads=2,
        head_dim=32,
        latent_channels=16,
        text_dim=32,
        mlp_ratio=1.0,
        image_size=(64, 96),
        sampler=SamplerConfig(num_steps=2, shift=3.0, guidance_scale=1.0),
        text=TextConfig(kind="bytes", length=12, dim=32, depth=1),
        refiner=RefinerConfig(num_layers=1, num_heads=2, head_dim=24, text_dim=32, lora_rank=0, sigmas=(0.5, 0.2, 0.0)),
        vae=dict(
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=(0, 0, 0, 0, 1),
            decoder_block_out_channels=(16, 16, 32),
            decoder_layers_per_block=(1, 0, 0, 0),
            upsample_factor=(1, 1, 2),
            decoder_spatial_padding_mode="zeros",
        ),
    )


@pytest.fixture
def config() -> WorldModelConfig:
    return small_config()

"""Encoded clips of noise, for what is measured or compared whatever is in the clips."""

from __future__ import annotations

import numpy as np

from longtake.model.config import WorldModelConfig
from longtake.platform.data.latents import EncodedClip, LatentStore


def write_random(store: LatentStore, config: WorldModelConfig, frames: int, clips: int) -> None:
    """`clips` clips of `frames` raw frames, along which a camera goes 5 metres ahead; a clip a shard.

    Where a frozen encoder would read captions, its features are noise too.
    """
    rng = np.random.default_rng(0)
    shape = config.latent_channels, config.latent_frames(frames), *config.latent_size
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 5, frames)
    height, width = config.image_size
    pinholes = np.tile(np.array([width, width, width / 2, height / 2], np.float32), (frames, 1))
    for number in range(clips):
        latents = rng.normal(size=shape).astype(np.float16)
        features = rng.normal(size=(32, config.text_dim)).astype(np.float16) if config.text.frozen else None
        store.write_shard(f"{number:04d}", [EncodedClip(f"{number}", latents, poses, pinholes, "noise", text=features)])

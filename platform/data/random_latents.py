"""Encoded clips of noise, for what is measured or compared whatever is in the clips."""

from __future__ import annotations

import numpy as np

from longtake.model.config import WorldModelConfig
from longtake.platform.data.latents import EncodedClip, LatentStore

_TOKENS, _REFINER_TOKENS = 32, 1024  # of a caption's features; the refiner's are padded to so many


def write_random(store: LatentStore, config: WorldModelConfig, frames: int, clips: int, versions: int = 0) -> None:
    """`clips` clips of `frames` raw frames, along which a camera goes 5 metres ahead; a clip a shard.

    Where a frozen encoder would read captions, its features are noise too, and the refiner's where it reads its own.
    versions: of each clip that a refiner would read, noise beside it.
    """
    rng = np.random.default_rng(0)
    shape = config.latent_channels, config.latent_frames(frames), *config.latent_size
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 5, frames)
    height, width = config.image_size
    pinholes = np.tile(np.array([width, width, width / 2, height / 2], np.float32), (frames, 1))
    for number in range(clips):
        latents = rng.normal(size=shape).astype(np.float16)
        clip = EncodedClip(f"{number}", latents, poses, pinholes, "noise")
        if config.text.frozen:
            clip.text = rng.normal(size=(_TOKENS, config.text_dim)).astype(np.float16)
        if config.refiner_reads_own_text:
            clip.refiner_text = rng.normal(size=(_REFINER_TOKENS, config.refiner.text_dim)).astype(np.float16)
        if versions:
            clip.noisy = (latents + rng.normal(size=(versions, *shape))).astype(np.float16)
            clip.timesteps = tuple(1000 * (k + 1) / (versions + 1) for k in range(versions))
        store.write_shard(f"{number:04d}", [clip])

"""Where rollouts begin when there is no corpus: pictures, and ways of a camera through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longtake.model.camera import parse_actions, random_actions
from longtake.model.pipeline import WorldPipeline
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.search.plan import load_images

_SHARD = 4  # clips


def write_starts(
    store: LatentStore, preset: str, folder: Path, images: Sequence[Path], count: int, frames: int
) -> None:
    """`count` clips of one latent frame, the images in turn, each with a random walk over `frames` raw frames.

    folder: weights with the autoencoder. Shards that are there stay. ValueError when there are no images.
    """
    names = [f"starts-{first:05d}" for first in range(0, count, _SHARD)]
    if not (missing := set(names) - set(store.shards())):
        return
    pipeline = WorldPipeline.from_pretrained(preset, folder, parts=["vae"])
    config = pipeline.config
    pictures = load_images(images, pipeline.prepare_image)
    latents = [pipeline.encode_image(picture.pixels)[0].half().numpy() for picture in pictures]

    def clip(number: int) -> EncodedClip:
        which = number % len(pictures)
        actions = random_actions(frames - 1, number, config.key_map)
        path = parse_actions(actions, config.key_map, config.fps, image_size=config.image_size)
        key = f"{pictures[which].name}-{number:05d}"
        poses, pinholes = path.c2w.numpy(), np.asarray(path.intrinsics)
        about = pictures[which].caption, config.fps, "train", pictures[which].licence
        return EncodedClip(key, latents[which], poses, pinholes, *about)

    for name, first in zip(names, range(0, count, _SHARD), strict=True):
        if name in missing:
            store.write_shard(name, [clip(number) for number in range(first, min(first + _SHARD, count))])

"""Encode clips into latents with a trained autoencoder, in parallel; run it again to resume.

Captions of a preset with a frozen text encoder become its features here, once, and its refiner's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.model import presets, weights
from longtake.model.config import WorldModelConfig
from longtake.model.pipeline import check_folder
from longtake.model.vae import build_vae, encode_frames
from longtake.platform.data.captions import CaptionEncoder, check_encoder
from longtake.platform.data.clip import Clip
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.shards import actor_device, make_shards
from longtake.platform.data.store import SCHEMA, ClipStore, decode_clip
from longtake.platform.observe.job import run_job
from longtake.platform.train.rows import index_rows, open_with
from longtake.platform.train.run import find_parts


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    folder = find_parts([args.weights]).get("vae") if args.weights else str(weights.resolve(config, None))
    if folder is None:
        raise ValueError(f"{args.weights} holds no autoencoder: give the run of stage0_vae with --weights")
    config = weights.config_for(config, Path(folder))
    check_folder(config, Path(folder), ["vae"])
    if config.text.frozen:
        check_encoder(Path(folder))
    if args.dry_run:
        print(json.dumps(vars(args) | {"weights": folder}, indent=2))
        return
    encode(config, args.data, args.latents, folder, args.frames, args.batch, args.actors_per_gpu)
    print(f"{len(LatentStore(args.latents))} encoded clips in {args.latents}")


def encode(
    config: WorldModelConfig,
    clips: str,
    latents: str,
    folder: str,
    frames: int,
    batch: int,
    actors_per_gpu: int | None = None,
) -> None:
    """Encode every shard of the clip store that the latent store lacks, by Ray Data actors (on CPUs by one).

    A clip gives one row for each `frames` consecutive frames; what is left of it is dropped. actors_per_gpu: while one
    decodes pictures, another keeps the GPU busy; by default 6 for `tiny`, else 1.

    ValueError when `frames` is not 8 k + 1, when images are not of the configuration's size, and when the latent store
    was encoded otherwise.
    """
    stride = config.vae_stride[0]
    if frames < 1 or (frames - 1) % stride or batch < 1:
        raise ValueError(f"--frames {frames} must be {stride} k + 1, and --batch {batch} at least 1")
    if actors_per_gpu is None:
        actors_per_gpu = 6 if config.name == "tiny" else 1
    if actors_per_gpu < 1:
        raise ValueError(f"--actors-per-gpu {actors_per_gpu} must be at least 1")
    store = ClipStore(clips)
    shards = store.shards()
    if not shards:
        raise ValueError(f"no clips in {clips}: render some with `longtake render-worlds --store {clips}`")
    open_with(f"{store.uri}/{shards[0]}.parquet", SCHEMA.names)
    encoding = {"preset": config.name, "frames": frames, "vae": weights.digest(Path(folder) / "vae")}
    if config.text.frozen:
        encoding["text"] = weights.digest(Path(folder) / "text_encoder")
        own = Path(folder) / weights.REFINER_TEXT
        if config.refiner_reads_own_text and own.is_dir():
            encoding["refiner_text"] = [weights.digest(own / part) for part in ("text_encoder", "connectors")]
    made = LatentStore(latents)
    made.claim(encoding)
    arguments = config, clips, latents, folder, frames, batch
    make_shards(ShardEncoder, arguments, shards, made, actors_per_gpu, "encode")


class ShardEncoder:
    """An actor that holds the autoencoder and turns shards of clips into shards of latents."""

    def __init__(
        self, config: WorldModelConfig, clips: str, latents: str, folder: str, frames: int, batch: int
    ) -> None:
        self.config, self.frames, self.batch = config, frames, batch
        self.clips, self.latents, self.folder = ClipStore(clips), LatentStore(latents), Path(folder)
        self._vae: Any = None
        self._captions: CaptionEncoder | None = None
        self.device = actor_device()

    @property
    def vae(self) -> Any:
        """Loaded by the first call: Ray passes on what a call raised, but not the error of a constructor."""
        if self._vae is None:
            self._vae = weights.load_part(build_vae(self.config), self.folder, "vae").to(self.device).eval()
        return self._vae

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = []
        for name in map(str, rows["shard"]):
            with self.clips.reading(name):
                encoded = list(self.encode(name))
            if self.config.text.frozen:
                self._captions = self._captions or CaptionEncoder(self.config, self.folder, self.device)
                encoded = list(self._captions(encoded))
            self.latents.write_shard(name, encoded)
            counts.append(len(encoded))
        return {"shard": rows["shard"], "clips": np.array(counts)}

    def encode(self, name: str) -> Iterator[EncodedClip]:
        """The encoded clips of one shard, in order."""
        waiting: list[Clip] = []
        for clip in self._windows(name):
            waiting.append(clip)
            if len(waiting) == self.batch:
                yield from self._encode(waiting)
                waiting = []
        if waiting:
            yield from self._encode(waiting)

    def _windows(self, name: str) -> Iterator[Clip]:
        """The clips of a shard, cut to length; threads decode ahead of the device."""
        index = index_rows([f"{self.clips.uri}/{name}.parquet"])
        jobs = (
            (row, start)
            for row, about in enumerate(index.read(range(len(index)), ["num_frames"]))
            for start in range(0, about["num_frames"] - self.frames + 1, self.frames)
        )

        def read(row: int, start: int) -> Clip:
            clip = decode_clip(index.read([row], SCHEMA.names)[0], start, start + self.frames)
            return dataclasses.replace(clip, key=f"{clip.key}@{start}") if start else clip

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            ahead = deque(pool.submit(read, *job) for job in islice(jobs, 2 * self.batch))
            if not ahead:
                raise ValueError(f"shard {name} has no clip of {self.frames} frames: lower --frames")
            while ahead:
                clip = ahead.popleft().result()
                ahead.extend(pool.submit(read, *job) for job in islice(jobs, 1))
                yield clip

    def _encode(self, clips: list[Clip]) -> Iterator[EncodedClip]:
        for clip in clips:
            if clip.image_size != self.config.image_size:
                raise ValueError(
                    f"clip {clip.key!r} is of {clip.image_size} pixels, preset {self.config.name!r} of "
                    f"{self.config.image_size}: render clips of that size"
                )
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips])).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            latents = encode_frames(self.vae, frames).half().cpu().numpy()
        for clip, latent in zip(clips, latents, strict=True):
            yield _encoded(clip, latent)


def _encoded(clip: Clip, latents: np.ndarray) -> EncodedClip:
    trajectory = clip.trajectory()  # in metres
    return EncodedClip(
        clip.key,
        latents,
        trajectory.c2w.numpy(),
        trajectory.intrinsics.numpy(),
        clip.caption,
        clip.fps,
        clip.split,
        clip.licence,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="encode-latents", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--data", required=True, help="store of clips: folder or s3://bucket/prefix")
    add("--latents", required=True, help="store of latents to write: folder or s3://bucket/prefix")
    add("--weights", help="run of stage0_vae or weights folder (default: those shipped)")
    add("--frames", type=int, default=81, help="frames a row: 81 are 5 s, 961 a minute")
    add("--batch", type=int, default=8, help="rows encoded at once")
    add("--actors-per-gpu", type=int, help="default: 6 for tiny, else 1")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

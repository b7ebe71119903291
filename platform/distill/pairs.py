"""Pairs that the refiner learns from: clips beside what stage 1 makes of them, by Ray Data actors."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.objectives import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.samplers.degrade import degraded
from longtake.model.text import tokenize
from longtake.platform.data.captions import stored_features
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.shards import ClipMaker, encoded_shards, make_shards


@dataclasses.dataclass(frozen=True)
class Coarse:
    """How clips lose detail: noised to each of `sigmas` and denoised by the stage-1 weights in `folder` in `num_steps`
    steps; a share `synthetic` of all versions is degraded without them instead. A clip's draws are of `seed` and its
    key.
    """

    config: WorldModelConfig
    folder: str
    sigmas: tuple[float, ...]
    num_steps: int = 4
    synthetic: float = 0.0
    seed: int = 0
    batch: int = 4


def make_pairs(coarse: Coarse, latents: str, pairs: str, actors_per_gpu: int = 1) -> None:
    """Put coarse versions beside every clip of the store `latents` whose shard the store `pairs` lacks.

    ValueError where the store is empty, or pairs were made otherwise.
    """
    shards, made = encoded_shards(latents), LatentStore(pairs)
    made.claim(
        {
            # Without stage 1 its weights do not matter.
            "stage1": weights.stage1_digests(coarse.config, Path(coarse.folder)) if coarse.synthetic < 1 else [],
            "sigmas": list(coarse.sigmas),
            "num_steps": coarse.num_steps,
            "synthetic": coarse.synthetic,
            "seed": coarse.seed,
        }
    )
    make_shards(PairMaker, (coarse, latents, pairs), shards, made, actors_per_gpu, "pairs")


class PairMaker(ClipMaker):
    """An actor that holds stage 1 and turns a shard of clips into one of pairs."""

    def __init__(self, coarse: Coarse, latents: str, pairs: str) -> None:
        super().__init__(latents, pairs, coarse.batch)
        self.coarse = coarse
        self._stage1: FlowObjective | None = None

    @property
    def stage1(self) -> FlowObjective:
        """Loaded by the first call: Ray passes on what a call raised, but not the error of a constructor."""
        if self._stage1 is None:
            stage1 = FlowObjective(self.coarse.config).requires_grad_(False)
            stage1.load(Path(self.coarse.folder))
            self._stage1 = stage1.to(self.device)
        return self._stage1

    @torch.no_grad()
    def make(self, clips: Sequence[EncodedClip]) -> Iterator[EncodedClip]:
        sigmas = self.coarse.sigmas
        draws = Draws(self.coarse.seed, [zlib.crc32(clip.key.encode()) for clip in clips], self.device)
        batch = self._batch(clips)
        by_sigma = [self._version(batch, draws, sigma) for sigma in sigmas]
        versions = torch.stack(by_sigma, 1).cpu().numpy().astype(np.float16)
        timesteps = tuple(1000 * sigma for sigma in sigmas)
        for clip, noisy in zip(clips, versions, strict=True):
            yield dataclasses.replace(clip, noisy=noisy, timesteps=timesteps)

    def _version(self, batch: dict[str, Tensor], draws: Draws, sigma: float) -> Tensor:
        """Of each clip one coarse version (B, C, T, h, w)."""
        synthetic = draws.uniform() < self.coarse.synthetic
        made = degraded(batch["latents"], draws.normal(*batch["latents"].shape[1:]), sigma)
        if self.coarse.synthetic < 1:  # clips are made together, so that what others drew changes none
            gpu = self.device.type == "cuda"
            with torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
                level = torch.full((len(synthetic),), sigma, device=self.device)
                true = self.stage1.reconstruct(batch, draws, level, self.coarse.num_steps).float()
            made = torch.where(synthetic[:, None, None, None, None], made, true)
        return made

    def _batch(self, clips: Sequence[EncodedClip]) -> dict[str, Tensor]:
        """What `FlowObjective` reads of clips."""
        text = self.coarse.config.text
        if not text.frozen:
            tokens, mask = tokenize([clip.caption for clip in clips], text.length)
            captions = {"tokens": tokens, "tokens_mask": mask}
        elif self.coarse.synthetic < 1:
            features, valid = stored_features(clips, text.length)
            captions = {"text": torch.from_numpy(features), "tokens_mask": torch.from_numpy(valid)}
        else:
            captions = {}
        arrays = {
            "latents": np.stack([clip.latents for clip in clips]).astype(np.float32),
            "c2w": np.stack([clip.c2w for clip in clips]),
            "intrinsics": np.stack([clip.intrinsics for clip in clips]),
        }
        batch = captions | {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: x.to(self.device) for name, x in batch.items()}

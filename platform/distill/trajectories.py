"""A teacher's trajectories from noise to clips, made by Ray Data actors: the first lesson of a few-step network."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.model import weights
from longtake.model.camera import CameraFeatures, Trajectory
from longtake.model.config import WorldModelConfig
from longtake.model.pipeline import WorldPipeline, check_folder
from longtake.platform.data.captions import stored_features
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.shards import ClipMaker, encoded_shards, make_shards
from longtake.platform.train.run import find_parts


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Bidirectional weights in `folder`, and what is asked of them: the latents at `timesteps` of their sampler in
    `num_steps` steps; a clip's noise is of `seed` and its key.
    """

    config: WorldModelConfig
    folder: str
    timesteps: tuple[float, ...]
    num_steps: int | None = None
    seed: int = 0
    batch: int = 4


def make_trajectories(teacher: Teacher, starts: str, trajectories: str, actors_per_gpu: int = 1) -> None:
    """Roll out every clip of the store `starts` whose shard the store `trajectories` lacks: from its first latent frame
    and caption, along its camera.

    ValueError where the store is empty, or was made otherwise.
    """
    shards, made = encoded_shards(starts), LatentStore(trajectories)
    made.claim(
        {
            "teacher": weights.stage1_digests(teacher.config, Path(teacher.folder)),
            "timesteps": list(teacher.timesteps),
            "num_steps": teacher.num_steps,
            "seed": teacher.seed,
        }
    )
    make_shards(TrajectoryMaker, (teacher, starts, trajectories), shards, made, actors_per_gpu, "trajectories")


class TrajectoryMaker(ClipMaker):
    """An actor that holds the teacher and turns a shard of clips into one of trajectories."""

    def __init__(self, teacher: Teacher, starts: str, trajectories: str) -> None:
        super().__init__(starts, trajectories, teacher.batch)
        self.teacher = teacher
        self._pipeline: WorldPipeline | None = None

    @property
    def pipeline(self) -> WorldPipeline:
        """Loaded by the first call: Ray passes on what a call raised, but not the error of a constructor."""
        if self._pipeline is None:
            config = self.teacher.config
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            stored = config.text.frozen and config.sampler.guidance_scale == 1  # features, and no negative text
            parts = ["dit"] if stored else ["dit", "text"]
            folder = Path(self.teacher.folder)
            self._pipeline = WorldPipeline.from_pretrained(config.name, folder, self.device, dtype, parts)
        return self._pipeline

    def make(self, clips: Sequence[EncodedClip]) -> Iterator[EncodedClip]:
        pipeline, config = self.pipeline, self.teacher.config
        paths = (Trajectory(torch.tensor(clip.c2w), torch.tensor(clip.intrinsics)) for clip in clips)
        camera = CameraFeatures.cat([path.features(config.image_size, config.vae_stride) for path in paths])
        start = np.stack([clip.latents[:, :1] for clip in clips]).astype(np.float32)
        passed = pipeline.trajectory(
            torch.from_numpy(start).to(self.device),
            *self._text(clips),
            camera,
            [zlib.crc32(f"{self.teacher.seed} {clip.key}".encode()) for clip in clips],
            self.teacher.timesteps,
            self.teacher.num_steps,
            pipeline.negatives(len(clips)),
        )
        for clip, x in zip(clips, passed.cpu().numpy().astype(np.float16), strict=True):
            yield dataclasses.replace(clip, latents=x[-1], noisy=x[:-1], timesteps=self.teacher.timesteps)

    def _text(self, clips: Sequence[EncodedClip]) -> tuple[Tensor, Tensor]:
        if not self.teacher.config.text.frozen:
            return self.pipeline.encode_text([clip.caption for clip in clips])
        features, mask = stored_features(clips, self.teacher.config.text.length)
        return torch.from_numpy(features).to(self.device), torch.from_numpy(mask).to(self.device)


def find_teacher(preset: WorldModelConfig, given: str | None) -> Path:
    """The weights folder of a teacher: a run's, or the one given, or the one shipped.

    ValueError where it is not whole, or sees no later chunks.
    """
    folder = find_stage1(preset, given)
    if weights.config_for(preset, folder).chunk_causal:
        raise ValueError(f"{folder} sees no later chunk: a teacher is of a stage before, such as stage3_minute")
    return folder


def find_stage1(preset: WorldModelConfig, given: str | None) -> Path:
    """The weights folder of a run's world model, or the one given, or the one shipped. ValueError where it is not
    whole.
    """
    folder = weights.resolve(preset, None) if given is None else Path(find_parts([given]).get("dit", given))
    config = weights.config_for(preset, folder)
    check_folder(config, folder, weights.stage1_parts(config))
    return folder.resolve()

"""The two pools of a search: generators make and score rollouts, refine writers refine, decode and encode."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch

from longtake.model.camera import Steering
from longtake.model.float8 import Quantization
from longtake.model.pipeline import WorldPipeline
from longtake.platform.evaluate.novelty import describe
from longtake.platform.evaluate.sample import Sample
from longtake.platform.evaluate.scores import score
from longtake.platform.observe.measurements import peak_memory
from longtake.platform.search.plan import Candidate
from longtake.platform.search.tree import Tree
from longtake.platform.store.video import encode_video

_LATENTS_OF_LONG = 11  # five seconds


@dataclass(frozen=True)
class ModelSpec:
    """How an actor loads its part of the model. threads: of torch, on a CPU. steering, fov_deg: the camera of trees."""

    preset: str
    weights: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quantization: Quantization | None = None
    num_steps: int | None = None
    threads: int = 1
    steering: Steering = Steering()
    fov_deg: float = 75.0

    def load(self, *parts: str) -> WorldPipeline:
        torch.set_num_threads(self.threads)
        given = self.preset, self.weights, self.device, self.dtype, parts
        return WorldPipeline.from_pretrained(*given, quantization=self.quantization)


@dataclass
class Made:
    """A rollout with its scores. latents: (C, T, h, w) float16. descriptor: what its novelty is computed from. cost: of
    the rollout alone, with what a leaf shares where it is the first to need it; see `_cost`.
    """

    latents: np.ndarray
    scores: dict[str, float]
    descriptor: str
    cost: dict[str, Any]


@dataclass
class Refined:
    """A refined video as MP4, its scores, and its frames where they are few enough to be a clip of a store."""

    video: bytes
    frames: np.ndarray | None
    scores: dict[str, float]
    cost: dict[str, Any]


class Generator:
    """Stage 1: text, rollout, decoding, scores."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model

    @cached_property
    def pipeline(self) -> WorldPipeline:
        """Loaded by the first call: Ray passes on what a method raised, but not the error of a constructor."""
        return self.model.load("text", "vae", "dit")

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.pipeline, self.model.steering, self.model.fov_deg)

    def make(self, candidates: list[Candidate], latents: list[np.ndarray | None]) -> list[Made]:
        """Roll out candidates together, of equal length or leaves of one tree. Where an earlier run left the latents of
        all of them, they are only scored.
        """
        pipeline, started = self.pipeline, time.monotonic()
        known = [each for each in latents if each is not None]
        todo = len(known) < len(candidates)
        if todo and candidates[0].branches:
            leaves = self.tree.leaves(candidates)
            cost = _cost((time.monotonic() - started) / len(candidates), pipeline)
            return [
                self._made(each, _stored(leaf.latents[0]), leaf.frames, cost)
                for each, leaf in zip(candidates, leaves, strict=True)
            ]
        made = self._rollouts(candidates) if todo else known
        cost = _cost((time.monotonic() - started) / len(candidates), pipeline)
        return [
            self._made(each, stored, self._decoded(each, stored), cost)
            for each, stored in zip(candidates, made, strict=True)
        ]

    def _rollouts(self, candidates: list[Candidate]) -> list[np.ndarray]:
        latents = self.pipeline.generate(
            [candidate.image.pixels for candidate in candidates],
            [candidate.image.caption for candidate in candidates],
            [candidate.trajectory for candidate in candidates],
            [candidate.seed for candidate in candidates],
            self.model.num_steps,
        )
        return [_stored(part) for part in latents]

    def _decoded(self, candidate: Candidate, latents: np.ndarray) -> Iterable[np.ndarray]:
        return self.pipeline.decode_chunks(_batch(latents[:, : _scored(candidate, latents)], self.pipeline))

    def _made(
        self, candidate: Candidate, latents: np.ndarray, chunks: Iterable[np.ndarray], cost: dict[str, Any]
    ) -> Made:
        frames = (_scored(candidate, latents) - 1) * self.pipeline.config.vae_stride[0] + 1
        sample = Sample(frames).of(chunks)
        return Made(latents, _score(candidate, sample), describe(sample.frames()), cost)


def _scored(candidate: Candidate, latents: np.ndarray) -> int:
    """Latent frames of which the scores are. Nothing depends on those of the one long video: of it, the beginning's."""
    return min(latents.shape[1], _LATENTS_OF_LONG) if candidate.purpose == "long" else latents.shape[1]


class RefineWriter:
    """Stage 2: text, refiner, decoding, MP4."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model

    @cached_property
    def pipeline(self) -> WorldPipeline:
        return self.model.load("text", "vae", "refiner")

    def refine(self, candidate: Candidate, latents: np.ndarray) -> Refined:
        """latents: (C, T, h, w) float16 of stage 1."""
        pipeline, started = self.pipeline, time.monotonic()
        text, mask = pipeline.encode_text([candidate.image.caption])
        refined = pipeline.refine(_batch(latents, pipeline), text, mask, [candidate.seed])
        sample = Sample(candidate.trajectory.num_frames)
        video = encode_video(sample.passing(pipeline.decode_chunks(refined)), candidate.trajectory.fps)
        cost = _cost(time.monotonic() - started, pipeline)
        frames = sample.frames() if sample.whole else None
        return Refined(video, frames, _score(candidate, sample), cost)


def _score(candidate: Candidate, sample: Sample) -> dict[str, float]:
    trajectory = candidate.trajectory
    c2w, intrinsics = trajectory.c2w.numpy()[sample.indices], trajectory.intrinsics.numpy()[sample.indices]
    return score(sample.frames(), c2w, intrinsics, trajectory.fps, sample.indices)


def _stored(latents: torch.Tensor) -> np.ndarray:
    return latents.cpu().numpy().astype(np.float16)


def _batch(latents: np.ndarray, pipeline: WorldPipeline) -> torch.Tensor:
    return torch.from_numpy(latents.astype(np.float32))[None].to(pipeline.device)


def _cost(seconds: float, pipeline: WorldPipeline) -> dict[str, Any]:
    """Seconds, and the most memory this process has held, in 1e9 bytes."""
    return {"seconds": seconds, "peak_gb": peak_memory() / 1e9, "device": pipeline.device.type}


def start_pool(kind: type, model: ModelSpec, count: int, num_gpus: float) -> list[Any]:
    """`count` actors of a kind; Ray restarts one that dies and repeats what it was doing, twice at most."""
    options = {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 2, "max_task_retries": 2}
    remote = ray.remote(kind).options(**options)  # type: ignore[call-overload]
    return [remote.remote(model) for _ in range(count)]

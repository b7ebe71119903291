"""Rollouts of a chunk-causal model that share what they begin with, as sessions that are cloned where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtake.model.camera import Steering, Trajectory, split_actions
from longtake.model.config import WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.platform.engine.session import Session, Step, step_together
from longtake.platform.search.plan import Candidate


def check_tree(config: WorldModelConfig, branches: Sequence[Trajectory]) -> None:
    """ValueError unless the weights can part and the branches, from their actions, are whole chunks."""
    if not config.chunk_causal:
        raise ValueError(f"the weights of {config.name!r} see the whole clip at once: a tree needs chunk-causal ones")
    if config.sampler.chunk_interval != 1:
        raise ValueError(f"{config.name!r} makes chunks side by side: a tree needs chunk_interval=1")
    if not config.vae.get("decoder_causal", True):
        raise ValueError(f"the decoder of {config.name!r} sees later frames: a tree needs decoder_causal=True")
    for branch in branches:
        assert branch.actions is not None
        split_actions(branch.actions, config.frames_per_chunk)


@dataclass(frozen=True)
class Leaf:
    """A rollout: latents (1, C, T, h, w) float32, and its frames in chunks, uint8 (f, H, W, 3) each."""

    latents: Tensor
    frames: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Node:
    """A session after some branches, and what it has made; what nodes have in common is there once."""

    session: Session
    latents: tuple[Tensor, ...] = ()
    frames: tuple[np.ndarray, ...] = ()


class Tree:
    """Makes leaves, and remembers the nodes above the last of them for those that follow.

    steering: what the keys do; fov_deg: horizontal field of view. num_segments: branches made so far.
    """

    def __init__(self, pipeline: WorldPipeline, steering: Steering, fov_deg: float) -> None:
        self.pipeline, self.steering, self.fov_deg = pipeline, steering, fov_deg
        self.num_segments = 0
        self._root: tuple[str, int] | None = None
        self._nodes: dict[tuple[str, ...], _Node] = {}

    def leaves(self, candidates: Sequence[Candidate]) -> list[Leaf]:
        """Roll out leaves of one tree; those nodes of a level that are new are made together."""
        first, last = candidates[0], candidates[-1]
        if first.root != self._root:
            session = Session(
                self.pipeline, first.image.pixels, first.image.caption, first.seed, self.fov_deg, self.steering
            )
            self._root, self._nodes = first.root, {(): _Node(session)}
        for level in range(1, len(first.branches) + 1):
            paths = dict.fromkeys(candidate.branches[:level] for candidate in candidates)
            self._grow([path for path in paths if path not in self._nodes])
        nodes = [self._nodes[candidate.branches] for candidate in candidates]
        kept = [last.branches[:level] for level in range(len(last.branches))]
        self._nodes = {path: node for path, node in self._nodes.items() if path in kept}
        return [Leaf(torch.cat(node.latents, 2), node.frames) for node in nodes]

    def _grow(self, paths: Sequence[tuple[str, ...]]) -> None:
        parents = [self._nodes[path[:-1]] for path in paths]
        grown = [_Node(parent.session.clone(), parent.latents, parent.frames) for parent in parents]
        pieces = [
            split_actions(path[-1], node.session.actions_per_chunk) for path, node in zip(paths, grown, strict=True)
        ]
        for number in range(max(map(len, pieces), default=0)):
            going_on = [index for index, of_branch in enumerate(pieces) if number < len(of_branch)]
            for alike in _of_equal_places(going_on, grown):
                steps = [Step(grown[index].session, pieces[index][number]) for index in alike]
                for index, chunk in zip(alike, step_together(steps), strict=True):
                    if isinstance(chunk, Exception):
                        raise chunk
                    node = grown[index]
                    grown[index] = _Node(node.session, (*node.latents, chunk.latents), (*node.frames, chunk.frames))
        self._nodes |= dict(zip(paths, grown, strict=True))
        self.num_segments += len(paths)


def _of_equal_places(indices: Sequence[int], nodes: Sequence[_Node]) -> list[list[int]]:
    """Branches of unlike lengths part sessions that otherwise can make their next chunks together."""
    found: dict[tuple, list[int]] = {}
    for index in indices:
        found.setdefault(nodes[index].session.place(), []).append(index)
    return list(found.values())

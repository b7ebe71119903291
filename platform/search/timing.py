"""A tree timed beside the same candidates rolled out one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from longtake.model.camera import Steering
from longtake.model.pipeline import WorldPipeline
from longtake.platform.search.plan import Candidate, subtrees
from longtake.platform.search.tree import Tree


def time_tree(
    pipeline: WorldPipeline, leaves: Sequence[Candidate], steering: Steering, fov_deg: float, batch_size: int
) -> dict[str, float]:
    """Figures of one tree: seconds for latents and frames of all its leaves, from sessions that share what they begin
    with, and from rollouts of `batch_size` of them at a time. The two take turns, subtree by subtree, after one batch
    each that is not counted.
    """
    shares = subtrees(leaves, batch_size)
    tree = Tree(pipeline, steering, fov_deg)
    Tree(pipeline, steering, fov_deg).leaves(shares[0][0])
    _roll_out(pipeline, shares[0][0])
    shared = alone = 0.0
    for batches in shares:
        started = time.perf_counter()
        for batch in batches:
            tree.leaves(batch)
        between = time.perf_counter()
        for batch in batches:
            _roll_out(pipeline, batch)
        shared, alone = shared + between - started, alone + time.perf_counter() - between
    return {
        "time_ratio": alone / shared,
        "seconds_tree": shared,
        "seconds_alone": alone,
        "candidates": len(leaves),
        "segments_tree": tree.num_segments,
        "segments_alone": sum(len(leaf.branches) for leaf in leaves),
        "batch_size": batch_size,
    }


def _roll_out(pipeline: WorldPipeline, candidates: Sequence[Candidate]) -> None:
    latents = pipeline.generate(
        [each.image.pixels for each in candidates],
        [each.image.caption for each in candidates],
        [each.trajectory for each in candidates],
        [each.seed for each in candidates],
    )
    for clip in latents.split(1):
        pipeline.decode(clip)

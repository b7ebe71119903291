"""The search itself: one driver feeds both pools and writes what comes back.

An image's best candidates go to the refiners as soon as all of that image's candidates are scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from longtake.platform.data.clip import Clip
from longtake.platform.observe.progress import Progress
from longtake.platform.search.actors import Made, Refined
from longtake.platform.search.plan import Candidate, subtrees
from longtake.platform.search.pool import Pool, Shares
from longtake.platform.store.page import write_page
from longtake.platform.store.run_folder import RunFolder
from longtake.platform.store.table import write_table


class Search:
    """Scores `candidates`, refines the `top_k` best of each image, and keeps `run`'s table and page up to date."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        run: RunFolder,
        top_k: int,
        provenance: dict[str, Any],
        batch_size: int = 1,
    ) -> None:
        self.run, self.provenance, self.top_k = run, provenance, top_k
        self.groups: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            self.groups.setdefault(candidate.image.name, []).append(candidate)
        self.scores: dict[str, float] = {}
        missing = {candidate.key for candidate in candidates if not self._known(candidate)}
        unfinished = [
            [batch for batch in batches if any(candidate.key in missing for candidate in batch)]
            for batches in subtrees(candidates, batch_size)
        ]
        self.to_make = Shares(unfinished)
        self.to_refine: deque[Candidate] = deque()
        self.chosen: list[Candidate] = []
        for image in self.groups:
            self._choose(image)
        refined = sum(min(top_k, len(group)) for group in self.groups.values())
        self.total = len(candidates) + refined
        self.pending = len(missing) + refined - (len(self.chosen) - len(self.to_refine))

    def execute(self, pools: Callable[[], tuple[Sequence[Any], Sequence[Any]]], label: str = "search") -> None:
        """Work until nothing is left. An actor's error ends the search; all that came back before it is kept.

        pools: gives the generators and the refine writers; not called when nothing is left to do.
        """
        if self.pending:
            generators, writers = pools()
            self._work(Pool(generators), Pool(writers), label)
        self.publish()

    def _work(self, makers: Pool, refiners: Pool, label: str) -> None:
        with Progress(self.total, "clips", label, initial=self.total - self.pending) as progress:
            while True:
                while makers.idle and (batch := self.to_make.next(makers.idle[-1])):
                    makers.call("make", batch, batch, [self._latents(candidate) for candidate in batch])
                while refiners.idle and self.to_refine:
                    candidate = self.to_refine.popleft()
                    rollout = self.run.rollout(candidate.key)
                    assert rollout is not None, candidate.key
                    refiners.call("refine", candidate, candidate, rollout["latents"])
                under_way = [*makers.busy, *refiners.busy]
                if not under_way:
                    break
                done = ray.wait(under_way)[0][0]
                if done in makers.busy:
                    batch, results = makers.take(done)
                    fresh = [pair for pair in zip(batch, results, strict=True) if pair[0].key not in self.scores]
                    for candidate, made in fresh:
                        self._keep_made(candidate, made)
                    progress.update(len(fresh), follow=results[-1].scores["follow"])
                else:
                    candidate, refined = refiners.take(done)
                    self._keep_refined(candidate, refined)
                    progress.update(1)

    def publish(self) -> None:
        """Rewrite the table and the page."""
        write_page(write_table(self.run))

    def best(self) -> Candidate:
        """The chosen candidate of highest score."""
        return max(self.chosen, key=lambda candidate: (self.scores[candidate.key], candidate.key))

    def _latents(self, candidate: Candidate) -> np.ndarray | None:
        """What an earlier run left of a candidate that is not scored. A leaf is made again instead: its scores are of
        the frames that its session decoded.
        """
        rollout = None if candidate.branches else self.run.rollout(candidate.key)
        return None if rollout is None else rollout["latents"]

    def _known(self, candidate: Candidate) -> bool:
        record = self.run.record(candidate.key)
        if record is not None:
            self.scores[candidate.key] = record["scores"]["total"]
        return record is not None

    def _choose(self, image: str) -> None:
        """Queue an image's best for the refiners, once all of its candidates are scored."""
        group = self.groups[image]
        if any(candidate.key not in self.scores for candidate in group):
            return
        best = sorted(group, key=lambda candidate: (-self.scores[candidate.key], candidate.key))[: self.top_k]
        self.chosen += best
        self.to_refine += [candidate for candidate in best if self.run.refined(candidate.key) is None]

    def _keep_made(self, candidate: Candidate, made: Made) -> None:
        trajectory = candidate.trajectory
        if self.run.rollout(candidate.key) is None:
            self.run.write_rollout(candidate.key, made.latents, trajectory.c2w.numpy(), trajectory.intrinsics.numpy())
        results = {"scores": made.scores, "cost": made.cost, "provenance": self.provenance}
        self.run.write_record(candidate.key, candidate.described() | results)
        self.scores[candidate.key] = made.scores["total"]
        self._choose(candidate.image.name)

    def _keep_refined(self, candidate: Candidate, refined: Refined) -> None:
        # A search killed before the record below was written left the clip already.
        if refined.frames is not None and candidate.key not in self.run.clips.shards():
            self.run.clips.write_shard(candidate.key, [self._clip(candidate, refined)])
        record = {"scores": refined.scores, "cost": refined.cost, "provenance": {"refined": True}}
        self.run.write_refined(candidate.key, refined.video, record)
        self.publish()

    def _clip(self, candidate: Candidate, refined: Refined) -> Clip:
        assert refined.frames is not None
        trajectory = candidate.trajectory
        return Clip(
            key=candidate.key,
            frames=refined.frames,
            c2w=trajectory.c2w.numpy(),
            intrinsics=trajectory.intrinsics.numpy(),
            fps=trajectory.fps,
            caption=candidate.image.caption,
            metric_scale=1.0,
            licence=candidate.image.licence,
            provenance=self.provenance | {"seed": candidate.seed, "image": candidate.image.name},
            actions=trajectory.actions,
        )

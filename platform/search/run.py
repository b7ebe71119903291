"""The search itself, in three steps: `search` rolls out and scores, `select` ranks what is scored, `refine` makes the
selected ones better. One driver feeds both pools and writes what comes back; each step goes on from what lies in the
run's folder, so they can be asked for apart.

Where they are asked for together, an image's best go to the refiners as soon as all of its candidates are scored.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import ray

from longtake.platform.data.clip import Clip
from longtake.platform.evaluate.scores import SCORES
from longtake.platform.observe.progress import Progress
from longtake.platform.search.actors import Made, Refined
from longtake.platform.search.plan import Candidate, subtrees
from longtake.platform.search.pool import Pool, Shares
from longtake.platform.search.selection import Rule
from longtake.platform.store.page import write_page
from longtake.platform.store.run_folder import Record, RunFolder
from longtake.platform.store.table import write_table

STEPS = ("search", "select", "refine")


class Search:
    """Scores `candidates`, refines those of each image that `rule` selects, keeps `run`'s table and page up to date.

    steps: which of `STEPS` to do. Selecting without searching ranks what is there; refining without selecting takes
    what was selected. ValueError when that is nothing, or was selected from other candidates. budget: seconds of
    rollouts after which none begins, those of earlier runs included; what there is then is selected from. note: what
    the page says besides, by default how the budget was kept.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        run: RunFolder,
        rule: Rule,
        provenance: dict[str, Any],
        batch_size: int = 1,
        steps: Collection[str] = STEPS,
        budget: float = math.inf,
        note: str | None = None,
    ) -> None:
        self.run, self.rule, self.provenance, self.steps, self.budget = run, rule, provenance, steps, budget
        self.groups: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            self.groups.setdefault(candidate.image.name, []).append(candidate)
        found = {candidate.key: run.record(candidate.key) for candidate in candidates}
        self.records = {key: record for key, record in found.items() if record is not None and _complete(record)}
        self.ranked: dict[str, list[dict[str, Any]]] = {}
        self.chosen: list[Candidate] = []
        self.to_refine: deque[Candidate] = deque()
        self.made, self._note = 0, note
        self.spent = run.seconds_spent()
        self.rolling = "search" in steps and self.spent < budget  # whether candidates are still being made
        self.to_make = Shares(self._unfinished(candidates, batch_size) if self.rolling else [])
        missing = len(candidates) - len(self.records) if self.rolling else 0
        if "select" in steps:
            if not self.records and "search" not in steps:
                raise ValueError(f"{run.path} holds no rollouts of these candidates: run --step search first")
            self._choose(*self.groups)
        elif "refine" in steps:
            self._choose_as_before()
        refined = self._num_to_choose() if "refine" in steps else 0
        self.total = (len(candidates) if "search" in steps else 0) + refined
        self.pending = missing + refined - (len(self.chosen) - len(self.to_refine) if refined else 0)

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
                if self.rolling and self.spent >= self.budget:
                    self._end_rollouts(makers)
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
                    fresh = [pair for pair in zip(batch, results, strict=True) if pair[0].key not in self.records]
                    for candidate, made in fresh:
                        self._keep_made(candidate, made)
                    progress.update(len(fresh), follow=results[-1].scores["follow"])
                else:
                    candidate, refined = refiners.take(done)
                    self._keep_refined(candidate, refined)
                    progress.update(1)

    def _end_rollouts(self, makers: Pool) -> None:
        """Begin none, and when the last are back select from what there is."""
        self.to_make.clear()
        if makers.busy:
            return
        self.rolling = False
        if "select" in self.steps:
            self._choose(*(image for image in self.groups if image not in self.ranked))

    def publish(self) -> None:
        """Rewrite the table and the page."""
        write_page(write_table(self.run), self.note())

    def note(self) -> str:
        """How a budget was kept; nothing where there is none."""
        if self._note is not None:
            return self._note
        if self.budget == math.inf:
            return ""
        unmade = sum(map(len, self.groups.values())) - len(self.records)
        left = f"{unmade} candidates were not rolled out" if unmade else "every candidate was rolled out"
        return f"budget: {self.spent:.1f} of {self.budget:.1f} s of rollouts spent, {left}"

    def best(self) -> Candidate:
        """The chosen candidate of highest score."""
        totals = {row["key"]: row["total"] for rows in self.ranked.values() for row in rows}
        return max(self.chosen, key=lambda candidate: (totals[candidate.key], candidate.key))

    def _unfinished(self, candidates: Sequence[Candidate], batch_size: int) -> list[list[list[Candidate]]]:
        """Batches in which anything is missing, by subtree."""
        return [
            [batch for batch in batches if any(candidate.key not in self.records for candidate in batch)]
            for batches in subtrees(candidates, batch_size)
        ]

    def _latents(self, candidate: Candidate) -> np.ndarray | None:
        """What an earlier run left of a candidate that is yet to be scored, or scored in other ways as well. A leaf
        without scores is made again instead: they are of the frames that its session decoded.
        """
        if candidate.branches and self.run.record(candidate.key) is None:
            return None
        rollout = self.run.rollout(candidate.key)
        return None if rollout is None else rollout["latents"]

    def _choose(self, *images: str) -> None:
        """Rank each image's candidates and queue its best for the refiners, once all are scored that will be."""
        for image in images:
            records = [self.records[each.key] for each in self.groups[image] if each.key in self.records]
            if not self.rolling or len(records) == len(self.groups[image]):
                self.ranked[image] = self.rule.ranked(records)
                self._queue(image)
        # The one long video is not selected from among others.
        if self.ranked and all(group[0].purpose == "search" for group in self.groups.values()):
            self.run.write_selection(self.rule.described(self.ranked))

    def _choose_as_before(self) -> None:
        selection = self.run.selection()
        if selection is None:
            raise ValueError(f"{self.run.path} holds no selection: run --step select first")
        known = {candidate.key for group in self.groups.values() for candidate in group}
        for image, rows in selection["images"].items():
            if other := next((row["key"] for row in rows if row["key"] not in known), None):
                raise ValueError(f"{other} was selected from other candidates: run --step select with these options")
            self.ranked[image] = rows
            self._queue(image)

    def _queue(self, image: str) -> None:
        """Take what is selected of an image to be refined, where that was not done."""
        candidates = {candidate.key: candidate for candidate in self.groups[image]}
        best = [candidates[row["key"]] for row in self.ranked[image] if row["selected"]]
        self.chosen += best
        if "refine" in self.steps:
            self.to_refine += [candidate for candidate in best if self.run.refined(candidate.key) is None]

    def _num_to_choose(self) -> int:
        if not self.rolling:
            return len(self.chosen)
        return sum(min(self.rule.top_k, len(group)) for group in self.groups.values())

    def _keep_made(self, candidate: Candidate, made: Made) -> None:
        self.made += 1
        trajectory = candidate.trajectory
        if self.run.rollout(candidate.key) is None:
            self.run.write_rollout(candidate.key, made.latents, trajectory.c2w.numpy(), trajectory.intrinsics.numpy())
        earlier = self.run.record(candidate.key)
        results = {
            "scores": made.scores,
            "descriptor": made.descriptor,
            "cost": made.cost if earlier is None else earlier["cost"],
            "provenance": self.provenance,
        }
        self.spent += made.cost["seconds"] if earlier is None and candidate.purpose == "search" else 0
        self.records[candidate.key] = candidate.described() | results
        self.run.write_record(candidate.key, self.records[candidate.key])
        if "select" in self.steps:
            self._choose(candidate.image.name)

    def _keep_refined(self, candidate: Candidate, refined: Refined) -> None:
        self.made += 1
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


def _complete(record: Record) -> bool:
    """Whether it has all that is known of a rollout today."""
    return "descriptor" in record and record["scores"].keys() >= SCORES.keys()

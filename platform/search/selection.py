"""Which candidates are refined: a rule, and what it makes of records."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longtake.platform.evaluate.novelty import novelty
from longtake.platform.evaluate.scores import SCORES, WEIGHTS, total
from longtake.platform.store.run_folder import Record

NAMES = (*SCORES, "novelty")


@dataclass(frozen=True)
class Rule:
    """The `top_k` of each image whose weighted scores are best."""

    top_k: int
    weights: Mapping[str, float]

    def ranked(self, records: Iterable[Record]) -> list[dict[str, Any]]:
        """Of one image's records, best first: key, novelty among them, total, and whether it is selected. Neither the
        order of the records nor what else is in them tells.
        """
        known = sorted(records, key=lambda record: record["key"])
        if not known:
            return []
        rows = []
        for record, new in zip(known, novelty([record["descriptor"] for record in known]), strict=True):
            scored = total(record["scores"] | {"novelty": new}, self.weights)
            rows.append({"key": record["key"], "total": scored, "novelty": new})
        rows.sort(key=lambda row: (-row["total"], row["key"]))
        return [row | {"selected": place < self.top_k} for place, row in enumerate(rows)]

    def described(self, images: Mapping[str, Sequence[dict[str, Any]]]) -> Record:
        """selection.json, of what was ranked for each image."""
        return {
            "top_k": self.top_k,
            "weights": dict(self.weights),
            "images": {name: images[name] for name in sorted(images)},
        }


def parse_weights(given: Sequence[str] | None) -> dict[str, float]:
    """NAME=WEIGHT each; by default `WEIGHTS`. ValueError for unknown names, other forms, and weights that are all 0."""
    if not given:
        return dict(WEIGHTS)
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown score {name!r}: choose one of {', '.join(NAMES)}{hint}")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--score {text} must be NAME=WEIGHT, such as {name}=0.5") from None
        if not math.isfinite(found[name]):
            raise ValueError(f"--score {text}: the weight must be a finite number")
    if not any(found.values()):
        raise ValueError("--score weights are all 0: give one that is not, such as follow=1")
    return found

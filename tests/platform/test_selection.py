"""Which candidates are selected, and that nothing but their scores tells."""

from __future__ import annotations

import numpy as np
import pytest

from longtake.platform.evaluate.novelty import describe, novelty
from longtake.platform.evaluate.scores import WEIGHTS
from longtake.platform.search.selection import Rule, parse_weights

pytestmark = pytest.mark.cpu


def record(key: str, grey: int = 0, follow: float = 0.5, drift: float = 0.1) -> dict:
    frames = np.full((9, 24, 36, 3), grey, np.uint8)
    scores = {"follow": follow, "sharpness": 0.5, "drift": drift}
    return {"key": key, "scores": scores, "descriptor": describe(frames)}


def keys(rows: list[dict], selected: bool = False) -> list[str]:
    return [row["key"] for row in rows if row["selected"] or not selected]


def test_other_weights_and_another_top_k_change_what_is_selected():
    records = [record("a", follow=0.9, drift=0.8), record("b", follow=0.5, drift=0.0), record("c", follow=0.1)]
    assert keys(Rule(1, WEIGHTS).ranked(records)) == ["a", "b", "c"]
    assert keys(Rule(2, {"drift": -1}).ranked(records), selected=True) == ["b", "c"]


def test_the_order_of_records_does_not_tell_to_the_last_bit():
    records = [record(key, grey=grey) for key, grey in zip("abcdef", (3, 17, 40, 90, 91, 255), strict=True)]
    rule = Rule(2, {"novelty": 1, "follow": 0.3})
    assert rule.ranked(records) == rule.ranked(reversed(records))


def test_the_novel_video_is_the_one_unlike_the_others():
    rows = Rule(1, {"novelty": 1}).ranked([record("a", 100), record("b", 110), record("c", 200)])
    assert keys(rows, selected=True) == ["c"]
    assert rows[0]["novelty"] == pytest.approx((100 + 90) / 2 / 255)
    assert novelty([describe(np.zeros((5, 24, 36, 3), np.uint8))]) == [0]


def test_a_descriptor_is_small_and_leaves_out_the_frame_that_all_share():
    frames = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), dtype=np.uint8)
    other = np.concatenate([frames[:1] // 2, frames[1:]])
    assert describe(frames) == describe(other) and len(describe(frames)) < 1000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("folow=1", "unknown score 'folow': .* did you mean 'follow'"),
        ("follow", "must be NAME=WEIGHT"),
        ("follow=much", "must be NAME=WEIGHT"),
        ("drift=nan", "finite"),
        ("drift=0", "all 0"),
    ],
)
def test_a_weight_that_is_none_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        parse_weights([given])

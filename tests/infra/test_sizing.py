"""The page on sizing says what the measurements say, and the config for clusters keeps to it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from longtake.model import presets

pytestmark = pytest.mark.cpu

TRIED = 8  # sessions of stage 1 at once


@pytest.fixture(scope="module")
def seconds(root: Path) -> tuple[float, float, float, float]:
    """That a chunk plays; that it takes in stage 1, alone and among eight; in a refiner."""
    stream, refiner = (
        json.loads((root / "docs" / "measurements" / f"{name}_h100.json").read_text())["figures"]
        for name in ("stream", "refiner")
    )
    config = presets.get("sana-wm-streaming")
    chunk = config.frames_per_chunk / config.fps
    alone, together = stream["chunk_ms_tenth_minute"] / 1e3, stream["sessions8_ms"] / TRIED / 1e3
    return chunk, alone, together, refiner["full_window_block_s"]


def test_the_seconds_are_those_measured(root, seconds):
    text = (root / "infra" / "sizing.md").read_text()
    found = [float(each) for each in re.findall(r"^\| (?:stage 1|refiner),[^|]*\| ([\d.]+) \|", text, re.MULTILINE)]
    assert found == [round(each, 3) for each in seconds[1:]]
    assert f"= {seconds[0]} s" in text and f"= {seconds[3] / seconds[2]:.1f} refiners" in text
    assert f"p / c = {seconds[0] / seconds[3]:.1f} times" in text


def test_the_cards_of_the_worked_table_follow_from_them(root, seconds):
    text = (root / "infra" / "sizing.md").read_text()
    chunk, _, together, refiner = seconds
    held = min(TRIED, math.floor(chunk / together)), math.floor(chunk / refiner)
    rows = [list(map(int, re.findall(r"\d+", row))) for row in re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE)]
    assert len(rows) == 5
    for videos, *cards, first, most_first, second, most_second in rows:
        assert cards == [math.ceil(videos / each) for each in held] == [most_first, most_second]
        assert first <= held[0] and second <= held[1]
        assert first * most_first >= videos and second * most_second >= videos


def test_videos_of_the_config_for_clusters_play_without_a_stop(infra, serve_config, seconds):
    settings = serve_config((infra / "serve" / "cluster.yaml").read_text())
    chunk, alone, _, refiner = seconds
    assert settings.stage1.together * alone <= chunk and settings.refiner.together * refiner <= chunk

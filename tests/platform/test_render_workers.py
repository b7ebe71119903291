"""The job that renders, on several workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.jobs import render_worlds

pytestmark = [pytest.mark.cpu, pytest.mark.ray]


def rendered(store: Path, workers: int) -> dict[str, bytes]:
    asked = {"--store": store, "--clips": 3, "--frames": 9, "--workers": workers}
    words = [str(word) for pair in asked.items() for word in pair]
    render_worlds.main([*words, "--maps", "freedoom1/E1M5", "freedoom2/MAP01"])
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_processes_render_what_one_process_renders(ray_cluster, tmp_path):
    one, two = (rendered(tmp_path / str(workers), workers) for workers in (1, 2))
    assert one == two and len(one) == 2

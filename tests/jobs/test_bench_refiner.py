"""The job that times the refiner beside diffusers' own."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench_refiner
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu


def test_both_refiners_are_timed_and_make_the_same(tmp_path, monkeypatch):
    write = measurements.write
    monkeypatch.setattr(bench_refiner.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    few = ["--preset", "tiny", "--layers", "1", "--frames", "13", "--text", "8", "--device", "cpu"]
    bench_refiner.main([*few, "--name", "here", "--quantization", "fp8"])
    figures = json.loads((tmp_path / "here.json").read_text())["figures"]
    assert figures["relative_difference"] < 1e-5
    assert figures["ratio"] == pytest.approx(figures["block_peer_s"] / figures["block_s"])
    assert figures["full_window_block_s"] > 0 and figures["full_window_block_fp8_s"] > 0
    assert 1e-4 < figures["relative_difference_fp8"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--frames", "11"], "never fill the window"), (["--name", "A b"], "lower-case"), (["--preset", "tyni"], "tiny")],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_refiner.main([*arguments, "--dry-run"])

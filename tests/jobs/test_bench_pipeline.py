"""The job that times whole videos."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench_pipeline
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu


def test_all_ways_of_making_a_video_are_timed(tmp_path, monkeypatch):
    write = measurements.write
    monkeypatch.setattr(bench_pipeline.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    few = ["--preset", "tiny", "--device", "cpu", "--seconds", "1.5", "--steps", "1", "--name", "here"]
    bench_pipeline.main(few)
    figures = json.loads((tmp_path / "here.json").read_text())["figures"]
    assert all(figure > 0 for figure in figures.values())
    parts = [figures[f"bidirectional_{part}_s"] for part in ("denoise", "refine", "decode")]
    assert figures["videos_per_hour_8"] == pytest.approx(8 * 3600 / sum(parts))
    assert {"decode_chunk_s", "fragment_s", "decoder_past_gb", "refiner_past_gb"} < figures.keys()
    assert {"streaming_x_realtime", "peak_gb", "bidirectional_peak_gb", "block_residency_peak_gb"} < figures.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seconds", "0"], "more than 0"), (["--steps", "0"], "at least 1"), (["--name", "A b"], "lower-case")],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_pipeline.main([*arguments, "--dry-run"])

"""The job that times videos made chunk by chunk."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench_stream
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu


def test_minutes_and_sessions_are_timed(tmp_path, monkeypatch):
    write = measurements.write
    monkeypatch.setattr(bench_stream.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    few = ["--minutes", "2", "--chunks-a-minute", "3", "--sessions", "2", "--depth", "4", "--name", "here"]
    bench_stream.main([*few, "--device", "cpu", "--quantization", "fp8"])
    figures = json.loads((tmp_path / "here.json").read_text())["figures"]
    assert figures.pop("slope_ms_per_chunk") is not None
    assert all(figure > 0 for figure in figures.values())
    assert {"minute_s", "chunk_ms_first_minute", "chunk_ms_last_minute", "sessions2_over_serial"} < figures.keys()


def test_a_dry_run_says_which_model_is_timed(capsys):
    bench_stream.main(["--preset", "sana-wm", "--dry-run"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["chunk_window"] == 1 and shown["config"]["sampler"]["timesteps"] == [1000, 960, 889, 727, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "at least 1"),
        (["--chunks-a-minute", "1"], "at least 2"),
        (["--preset", "sana-wm-streaming"], "has no stage"),
        (["--name", "A b"], "lower-case"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_stream.main([*arguments, "--dry-run"])

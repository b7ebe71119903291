"""The job that times the network beside diffusers'."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu

SMALL = [
    "--preset",
    "tiny",
    "--depth",
    "4",
    "--device",
    "cpu",
    "--kernels",
    "2",
    "--gdn",
    "2",
    "--forward",
    "2",
    "--train",
    "1",
]


def test_it_writes_times_ratios_and_a_plot(tmp_path, monkeypatch):
    write = measurements.write
    monkeypatch.setattr(bench.measurements, "write", lambda name, figures: write(name, figures, folder=tmp_path))
    bench.main([*SMALL, "--name", "speed_here"])
    figures = json.loads((tmp_path / "speed_here.json").read_text())["figures"]
    assert figures["forward_ratio_T2"] == pytest.approx(figures["forward_peer_ms_T2"] / figures["forward_ms_T2"])
    assert figures["train_ms_T1"] > 0 and figures["gdn_layer_fwd_ms_T2"] > 0 and figures["matmul_tflops"] > 0
    for what in ("error", "error_gradients"):  # both round what softmax attends to to bfloat16
        assert 0 < figures[f"{what}_ours"] < 1e-2 and figures[f"{what}_ours"] < 2 * figures[f"{what}_peer"]
    assert 0.03 < figures["attention_float8_error"] < 0.06
    assert figures["read_ms_T2"] > 0 and figures["fused_over_unfused_train"] > 0
    assert (tmp_path / "speed_here.png").stat().st_size > 1000


def test_no_speed_of_a_wrong_output(monkeypatch):
    monkeypatch.setattr(bench.Pair, "_theirs", lambda self, inputs: -self._step(inputs)())
    with pytest.raises(ValueError, match="differs from the peer's"):
        bench.main([*SMALL, "--no-write"])


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--forward", "0"], "at least 1"), (["--name", "Not a name"], "lower-case words")]
)
def test_mistakes_are_named_before_a_model_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.main([*SMALL, *arguments])

"""The job that compares a rollout from what is kept with one that keeps nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest

from longtake.jobs import check_stream
from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.model.dit.positions import RotaryTable
from longtake.platform.observe import measurements
from longtake.platform.train import stages
from longtake.platform.train.run import configured

pytestmark = pytest.mark.cpu


@pytest.fixture
def config() -> WorldModelConfig:
    few = configured(presets.get("tiny"), stages.get("stage4_distill", "tiny"))
    return dataclasses.replace(few, depth=4, hidden_size=64, num_heads=2)


def test_every_chunk_has_an_error_and_none_is_large(config):
    errors = check_stream.cached_errors(config, 4)
    assert len(errors) == 4 and errors[0] < 1e-6 and max(errors) < 1e-5


def test_a_past_that_is_not_turned_is_found(config, monkeypatch):
    still = RotaryTable.turn
    monkeypatch.setattr(RotaryTable, "turn", lambda self, frames, device: still(self, 0, device))
    errors = check_stream.cached_errors(config, 3)
    assert errors[0] < 1e-6 and min(errors[1:]) > 1e-3


def test_figures_are_of_both_models_and_an_error_too_large_is_one(monkeypatch, tmp_path):
    write = measurements.write
    monkeypatch.setattr(check_stream.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    monkeypatch.setattr(check_stream, "cached_errors", lambda *_: [0.0, 2e-6, 1e-6])
    check_stream.main([])
    figures = json.loads((tmp_path / "cached_parity.json").read_text())["figures"]
    found = {"worst": 2e-6, "last": 1e-6}
    names = ("tiny_depth8", "sana-wm_depth4")
    assert figures == {f"{which}_error_{name}": error for name in names for which, error in found.items()}
    monkeypatch.setattr(check_stream, "cached_errors", lambda *_: [0.0, 2e-5])
    with pytest.raises(ValueError, match="worst_error_tiny_depth8, .*: more than 1e-05"):
        check_stream.main([])
    with pytest.raises(ValueError, match="at least 2"):
        check_stream.main(["--chunks", "1"])


def test_a_dry_run_shows_both_models(capsys):
    check_stream.main(["--dry-run"])
    tiny, wide = json.loads(capsys.readouterr().out)["configs"]
    assert (tiny["depth"], wide["depth"], wide["hidden_size"]) == (8, 4, 2240)

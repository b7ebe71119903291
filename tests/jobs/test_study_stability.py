"""The job that shows what the scale of the GDN's keys is for."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from longtake.jobs import study_stability
from longtake.kernels.gdn.reference import frame_maps
from longtake.model import presets
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu


def test_unscaled_keys_do_not_last_and_scaled_ones_do(tmp_path, monkeypatch):
    write = measurements.write
    monkeypatch.setattr(study_stability.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    study_stability.main(["--steps", "2", "--frames", "21", "--depth", "2", "--device", "cpu"])
    figures = json.loads((tmp_path / "stability.json").read_text())["figures"]
    assert figures["finite_steps_tokens"] == 2 and figures["finite_steps_none"] < 2
    assert math.isfinite(figures["last_finite_loss_tokens"])
    assert (tmp_path / "stability.png").stat().st_size > 1000


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least 1"):
        study_stability.main(["--steps", "0"])
    with pytest.raises(ValueError, match="key_scale 'rows' must be one of tokens, channels, none"):
        dataclasses.replace(presets.get("tiny"), key_scale="rows")  # type: ignore[arg-type]


def test_what_a_frame_erases_has_a_spectral_norm_of_at_most_1_over_the_heads():
    """With the scale 1/sqrt(D S), of keys whose rows have unit mean square over all heads, and beta at most 1."""
    tokens, heads, channels = 24, 4, 8
    keys = torch.randn(1, 1, tokens, heads, channels, generator=torch.Generator().manual_seed(0)).relu()
    keys = keys / keys.square().mean((-1, -2), keepdim=True).sqrt() * (channels * tokens) ** -0.5
    transition, _ = frame_maps(keys, keys, torch.ones(1, 1, tokens, heads), torch.ones(1, 1, heads))
    erased = torch.eye(channels) - transition[0, 0]
    norms = torch.linalg.matrix_norm(erased, 2)
    assert norms.mean() <= 1 and norms.min() > 0.1

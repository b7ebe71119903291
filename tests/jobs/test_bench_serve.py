"""The job that times sessions through HTTP; sessions themselves are timed in tests/serve/test_app.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longtake.jobs import bench_serve
from longtake.model import presets
from longtake.serve.settings import Settings

pytestmark = pytest.mark.cpu


def test_stages_of_random_weights_are_timed_alone(small_config, monkeypatch):
    refiner = dataclasses.replace(small_config.refiner, block_size=3)
    streaming = presets.get("tiny-streaming")
    config = dataclasses.replace(
        small_config, chunk_causal=True, chunk_window=1, sampler=streaming.sampler, fps=16.0, refiner=refiner
    )
    monkeypatch.setattr(presets, "get", lambda name: config)
    settings = Settings.checked({"random_weights": True})
    assert settings.refines and settings.folder is None
    step, refined = bench_serve.measure_alone(settings, torch.device("cpu"), 9)
    assert step > 0 and refined > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--chunks", "8"], "more than 8"), (["--name", "A b"], "lower-case"), (["--preset", "tiny"], "no endless video")],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_serve.main([*arguments, "--dry-run"])


def test_random_weights_and_a_folder_exclude_each_other():
    with pytest.raises(ValueError, match="random_weights"):
        Settings.checked({"random_weights": True, "weights": "somewhere"})

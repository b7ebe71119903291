"""The job that times sessions through HTTP; sessions themselves are timed in tests/serve/test_app.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longtake.jobs import bench_serve
from longtake.model import presets
from longtake.serve.settings import Settings

pytestmark = pytest.mark.cpu


def test_stages_of_random_weights_are_timed_alone(small_config):
    refiner = dataclasses.replace(small_config.refiner, block_size=3)
    sampler = presets.get("tiny-streaming").sampler
    config = dataclasses.replace(small_config, chunk_causal=True, chunk_window=1, sampler=sampler, fps=16.0)
    step, none = bench_serve.measure_alone(config, torch.device("cpu"), 9)
    assert step > 0 and none == 0
    assert all(bench_serve.measure_alone(dataclasses.replace(config, refiner=refiner), torch.device("cpu"), 9))


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

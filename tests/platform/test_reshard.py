"""What a universal checkpoint leaves out. Whole runs that change their workers are in test_train.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longtake.platform.train import reshard

pytestmark = pytest.mark.cpu


def module(value):
    built = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    built[0].requires_grad_(False)
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.fill_(value)
    return built


def test_buffers_and_frozen_parameters_come_from_the_checkpoint(tmp_path):
    torch.save({"module": module(3).state_dict()}, tmp_path / "mp_rank_00_model_states.pt")
    loaded = module(0)
    reshard._load_untrained(loaded, tmp_path)
    assert {name for name, tensor in loaded.state_dict().items() if (tensor == 3).all()} == {
        *("0.weight", "0.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    }


def test_a_checkpoint_that_cannot_be_converted_says_why(tmp_path):
    (tmp_path / "step-00000001" / "state").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="could not convert"):
        reshard._convert(tmp_path / "step-00000001" / "state", tmp_path / "whole")

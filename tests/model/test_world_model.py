"""What the network's options change, and what they do not."""

import dataclasses

import pytest
import torch

from longtake.model import WorldModel  # type: ignore[attr-defined]  # made in longtake/__init__.py
from longtake.model.parity import CASES

pytestmark = pytest.mark.cpu


def model_and_inputs(config):
    torch.manual_seed(0)
    model = WorldModel(config)
    for parameter in model.parameters():  # zero-initialised projections would hide what stands before them
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, dataclasses.replace(CASES[0], config=config).inputs()


def test_blocks_that_are_computed_again_give_the_same_gradients(config):
    gradients = []
    for again in (False, True):
        model, inputs = model_and_inputs(config)
        model.checkpoint_blocks = again
        calls = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        velocity = model(*inputs)
        velocity.square().mean().backward()
        assert len(calls) == 1 + again
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)

"""The whole network through the kernels against the same network through the definitions."""

import dataclasses

import pytest
import torch

from longtake.kernels import gdn, glu_conv, short_conv, ucpe
from longtake.model.dit.world_model import WorldModel
from longtake.model.parity import CASES

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu


@pytest.mark.parametrize("camera", [True, False])
def test_velocity_and_gradients_are_the_definitions(device, camera, monkeypatch):
    config = dataclasses.replace(CASES[0].config, depth=2, softmax_every=2, hidden_size=32, num_heads=2, head_dim=16)
    config = dataclasses.replace(config, softmax_dtype="float32")
    case = dataclasses.replace(CASES[0], config=config, frames=2, height=2, width=3, batch=2, camera=camera)
    torch.manual_seed(0)
    model = WorldModel(config).to(device)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = [None if x is None else x.to(device) for x in case.inputs()]
    results = []
    for triton in (False, True):
        for operator in (gdn, glu_conv, short_conv, ucpe):
            monkeypatch.setattr(operator, "fused", lambda *_, triton=triton: triton)
        model.zero_grad()
        velocity = model(*inputs)
        velocity.square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"velocity": velocity.detach(), **found})
    true, found = results
    assert true.keys() == found.keys()
    for name, value in true.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name

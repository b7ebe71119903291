"""The whole network through the kernels against the same network through the definitions."""

import dataclasses

import pytest
import torch

from longtake.kernels import attention, gdn, glu_conv, modulate, short_conv, ucpe
from longtake.model.dit.world_model import WorldModel
from longtake.model.parity import CASES
from longtake.model.stream import ChunkStream

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


@torch.no_grad()
@pytest.mark.parametrize("camera", [True, False] if torch.cuda.is_available() else [True])
def test_chunks_of_weights_laid_out_are_those_of_the_definitions(device, camera, monkeypatch):
    half = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter is wrong in bfloat16
    sizes = {"depth": 2, "softmax_every": 2, "hidden_size": 32, "num_heads": 2, "head_dim": 16}
    config = dataclasses.replace(CASES[0].config, chunk_causal=True, chunk_window=1, softmax_dtype="float32", **sizes)
    case = dataclasses.replace(CASES[0], config=config, frames=9, height=1, width=2, batch=1, camera=camera)
    torch.manual_seed(0)
    model = WorldModel(config).to(device)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    _, _, text, mask, features = case.inputs()
    mask[:, len(mask[0]) // 2 :] = 0
    given = text.to(device), mask.to(device), None if features is None else features.to(device)
    latents = torch.randn(1, config.latent_channels, 9, 1, 2, device=device)
    true = _rolled_out(ChunkStream(model, *given), latents)
    for operator in (attention, gdn, glu_conv, modulate, short_conv, ucpe):
        monkeypatch.setattr(operator, "fused", lambda *_: True)
    found = _rolled_out(ChunkStream(model.to(half).lay_out(), *given), latents)
    for chunk, (ours, theirs) in enumerate(zip(found, true, strict=True)):
        assert (ours.float() - theirs).norm() <= 3e-2 * theirs.norm(), chunk


def _rolled_out(stream, latents):
    velocities = []
    for chunk in latents.split(3, 2):
        velocities.append(stream.velocity(chunk, torch.full((1, 3), 500.0, device=chunk.device), [3]))
        stream.keep(chunk, [3])
    return velocities

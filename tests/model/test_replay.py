"""Denoising steps of a prepared context, and their replay."""

import dataclasses

import pytest
import torch

from longtake.model import presets
from longtake.model.dit.replay import Replay
from longtake.model.dit.world_model import WorldModel
from longtake.model.parity import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu


@torch.no_grad()
@pytest.mark.parametrize("camera", [True, False])
def test_a_step_is_the_networks_velocity(camera):
    config = dataclasses.replace(presets.get("tiny"), depth=4)
    torch.manual_seed(0)
    model = WorldModel(config).to(DEVICE)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    case, replay = Case("steps", config, 2, 3, 4, camera=camera), Replay(model)
    clips = []
    for seed in range(2):
        _, _, text, mask, features = case.inputs(seed)
        given = text.to(DEVICE), mask.to(DEVICE), None if features is None else features.to(DEVICE)
        clips.append((given, model.context((2, 3, 4), *given, of_sample=True)))
    latents, timestep, *_ = case.inputs()
    for step, clip in enumerate([0, 0, 1, 0, 1]):  # as with guidance, two samples take turns
        given, context = clips[clip]
        x, sigma = (latents + step).to(DEVICE), (timestep + step).to(DEVICE)
        torch.testing.assert_close(replay.velocity(x, sigma, context), model(x, sigma, *given), rtol=1e-4, atol=1e-4)
    assert len(replay._captured) == (DEVICE == "cuda")

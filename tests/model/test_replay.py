"""Denoising steps of a prepared context, and their replay."""

import dataclasses

import pytest
import torch

from longtake.model import presets
from longtake.model.dit.replay import Replay
from longtake.model.dit.world_model import WorldModel
from longtake.model.parity import Case
from longtake.model.stream import ChunkStream

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


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_streams_that_take_turns_go_on_as_without_replay(guidance):
    sampler = dataclasses.replace(presets.get("tiny").sampler, guidance_scale=guidance)
    config = dataclasses.replace(presets.get("tiny"), depth=4, chunk_causal=True, chunk_window=1, sampler=sampler)
    torch.manual_seed(0)
    model = WorldModel(config).to(DEVICE)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    replay, pairs = Replay(model), []
    for seed in range(2):
        _, _, text, mask, features = Case("chunks", config, 18, 3, 4).inputs(seed)
        assert features is not None
        given = text.to(DEVICE), mask.to(DEVICE), features.to(DEVICE)
        negative = None if guidance == 1 else (torch.zeros_like(given[0]), given[1])
        pairs.append([ChunkStream(model, *given, negative, run) for run in (replay, None)])
    for chunk in range(6):
        for pair in pairs:
            x = torch.randn(1, config.latent_channels, 3, 3, 4, device=DEVICE)
            for timestep in (1000.0, 500.0):
                t = torch.full((1, 3), timestep, device=DEVICE)
                found, true = (stream.velocity(x - timestep / 1000, t, [3]) for stream in pair)
                torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4, msg=f"chunk {chunk}, {timestep}")
            for stream in pair:
                stream.keep(x, [3])
            # As of a snapshot, whose tensors come by their names.
            traces = dict(reversed(list(pair[0].state.traces.items())))
            pair[0]._go_on(dataclasses.replace(pair[0].state, traces=traces))
    for replayed, plain in pairs:
        for at, trace in plain.state.traces.items():
            torch.testing.assert_close(replayed.state.traces[at], trace, rtol=1e-4, atol=1e-4)
    assert [list(stream._axis_of([3]).seen) for stream in pairs[0]] == 2 * [sorted(pairs[0][0].state.traces)]
    # The first chunk, one that sees the first, and one that sees the last as well.
    assert len(replay._captured) == 3 * (DEVICE == "cuda")

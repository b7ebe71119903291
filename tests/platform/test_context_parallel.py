"""A clip on several processes equals the clip on one: velocity, loss and every parameter's gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from longtake.model import presets
from longtake.model.camera import CameraFeatures, camera_features, parse_actions
from longtake.model.dit.world_model import WorldModel
from longtake.platform.parallel.context import ContextParallel

pytestmark = pytest.mark.cpu

CONFIG = dataclasses.replace(presets.get("tiny"), depth=4, hidden_size=96, num_heads=3)


def model_and_clip(frames: int) -> tuple[WorldModel, dict]:
    torch.manual_seed(0)
    model = WorldModel(CONFIG)
    for parameter in model.parameters():  # what starts at zero would hide its neighbours
        parameter.data += 0.05 * torch.randn_like(parameter)
    actions = f"w-{4 * (frames - 1)},dw-{4 * (frames - 1)}"
    trajectory = parse_actions(actions, fps=16, image_size=(64, 96))
    camera = camera_features(
        trajectory.c2w.float()[None].repeat(2, 1, 1, 1),
        trajectory.intrinsics.float()[None].repeat(2, 1, 1),
        (64, 96),
        CONFIG.vae_stride,
    )
    clip = dict(
        latents=torch.randn(2, CONFIG.latent_channels, frames, 2, 3),
        timestep=torch.rand(2, frames) * 1000,
        text=torch.randn(2, CONFIG.text.length, CONFIG.text_dim),
        text_mask=torch.ones(2, CONFIG.text.length),
        camera=camera,
    )
    return model, clip


def shared_loss(velocity: torch.Tensor, frames: int) -> torch.Tensor:
    """A rank's share of a mean over the clip's frames."""
    return velocity.square().mean((0, 1, 3, 4)).sum() / frames


def on_a_rank(rank: int, ranks: int, frames: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model, clip = model_and_clip(frames)
    axis = ContextParallel(frames)
    camera = clip["camera"]
    clip["latents"], clip["timestep"] = axis.held(clip["latents"], 2), axis.held(clip["timestep"], 1)
    clip["camera"] = CameraFeatures(axis.held(camera.conditions, 1), axis.held(camera.plucker, 2))
    velocity = model(**clip, time_axis=axis)
    loss = shared_loss(velocity, frames)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradient in (loss.detach_(), *gradients.values()):
        dist.all_reduce(gradient)
    torch.save((velocity.detach(), loss, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "frames"), [(2, 7), (3, 5), (4, 5)])
def test_a_clip_cut_between_processes_gives_the_same_gradients(ranks: int, frames: int, tmp_path: Path):
    processes.start_processes(on_a_rank, (ranks, frames, str(tmp_path)), nprocs=ranks, start_method="spawn")
    model, clip = model_and_clip(frames)
    velocity = model(**clip)
    loss = shared_loss(velocity, frames)
    loss.backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    torch.testing.assert_close(torch.cat([stretch for stretch, _, _ in found], dim=2), velocity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], loss.detach())
    true = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert true.keys() == found[0][2].keys()
    for name, gradient in true.items():
        difference = (found[0][2][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert difference < 1e-5, f"{name}: {difference}"


def test_a_clip_of_fewer_frames_than_ranks_is_refused(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="0 latent frames cannot be cut into 1 stretches"):
            ContextParallel(0)
    finally:
        dist.destroy_process_group()

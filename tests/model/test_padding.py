"""Clips padded to one length give what each gives alone: velocity, loss and every parameter's gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from longtake.model.camera import CameraFeatures
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel
from longtake.model.objectives import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.text import tokenize

pytestmark = pytest.mark.cpu

FRAMES = (3, 7)  # latent frames of the two clips
NOISE = 100.0  # of what is in the padding


@pytest.fixture
def exact(config: WorldModelConfig) -> WorldModelConfig:
    return dataclasses.replace(config, softmax_dtype="float32")


def perturbed(module):
    for parameter in module.parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module


def close(found: Tensor, true: Tensor) -> bool:
    return bool((found - true).norm() <= 1e-5 * true.norm() + 1e-8)  # gradients are 1e-4 and more, or 0


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def poses(frames: int) -> Tensor:
    """Steps ahead and to the right."""
    c2w = torch.eye(4).repeat(frames, 1, 1)
    c2w[:, 0, 3], c2w[:, 2, 3] = torch.linspace(0, 1, frames), torch.linspace(0, 2, frames)
    return c2w


@pytest.fixture
def batch(exact: WorldModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    longest = 8 * max(FRAMES) - 7
    ids, mask = tokenize(["a hall", "outdoors"], exact.text.length)
    padded = {
        "latents": torch.randn(2, exact.latent_channels, max(FRAMES), 2, 3),
        "c2w": poses(longest).repeat(2, 1, 1, 1),
        "intrinsics": torch.tensor([60.0, 60.0, 48.0, 32.0]).repeat(2, longest, 1),
        "tokens": ids,
        "tokens_mask": mask,
        "frames": torch.tensor(FRAMES),
    }
    for clip, frames in enumerate(FRAMES):
        padded["latents"][clip, :, frames:].normal_(std=NOISE)
        padded["c2w"][clip, 8 * frames - 7 :].normal_(std=NOISE)
        padded["intrinsics"][clip, 8 * frames - 7 :].uniform_(1, NOISE)
    return padded


def alone(batch: dict[str, Tensor], clip: int) -> dict[str, Tensor]:
    cuts = {"latents": (2, FRAMES[clip]), "c2w": (1, 8 * FRAMES[clip] - 7), "intrinsics": (1, 8 * FRAMES[clip] - 7)}
    each = {name: x[clip : clip + 1] for name, x in batch.items() if name != "frames"}
    return each | {name: each[name].narrow(dim, 0, length) for name, (dim, length) in cuts.items()}


@pytest.mark.parametrize("changes", [{}, {"contractive_gdn": True, "ucpe_downscale": False}, {"softmax_every": 1}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_padding_changes_nothing_of_the_network(changes, checkpointed, exact, batch):
    objective = perturbed(FlowObjective(dataclasses.replace(exact, **changes)))
    model = objective.world_model
    model.checkpoint_blocks = checkpointed
    text, mask = (x.detach() for x in objective.encode_text(batch))
    camera, timestep = objective.camera(batch), 1000 * torch.rand(2, max(FRAMES))
    together = model(batch["latents"], timestep, text, mask, camera, frames=batch["frames"])
    assert together.isfinite().all()
    loss = torch.stack([together[clip, :, :frames].square().mean() for clip, frames in enumerate(FRAMES)]).sum()
    loss.backward()
    found, losses = gradients(model), []
    for clip, frames in enumerate(FRAMES):
        one = slice(clip, clip + 1)
        seen = CameraFeatures(camera.conditions[one, :frames], camera.plucker[one, :, :frames])
        velocity = model(batch["latents"][one, :, :frames], timestep[one, :frames], text[one], mask[one], seen)
        assert close(together[one, :, :frames], velocity)
        losses.append(velocity.square().mean())
    true_loss = torch.stack(losses).sum()
    true_loss.backward()
    true = gradients(model)
    assert close(loss, true_loss) and found.keys() == true.keys()
    assert [name for name in true if not close(found[name], true[name])] == []


@pytest.mark.parametrize("image_condition", [0.0, 1.0])
def test_padding_changes_nothing_of_the_objective(image_condition, exact, batch):
    # Of these draws, the first clip keeps its camera and caption, and the second neither.
    objective = perturbed(FlowObjective(exact, image_condition, caption_dropout=0.5, camera_dropout=0.5))
    together, metrics = objective(batch, Draws(10, [0, 1]))
    together.backward()
    found = gradients(objective)
    losses = [objective(alone(batch, clip), Draws(10, [clip]))[0] for clip in range(2)]
    loss = torch.stack(losses).mean()
    loss.backward()
    true = gradients(objective)
    assert close(together, loss) and all(value.isfinite() for value in metrics.values())
    assert [name for name in true if not close(found[name], true[name])] == []


def test_samples_of_padded_clips_are_those_of_the_clips(exact, batch):
    objective = perturbed(FlowObjective(exact))
    together = objective.sample(batch, Draws(0, [0, 1]))
    for clip, frames in enumerate(FRAMES):
        sample = objective.sample(alone(batch, clip), Draws(0, [clip]))
        torch.testing.assert_close(together[clip : clip + 1, :, :frames], sample, rtol=1e-4, atol=1e-4)


def test_a_lone_image_as_condition_has_no_loss(exact, batch):
    objective = FlowObjective(exact, image_condition=1.0)
    loss, _ = objective(batch | {"frames": torch.tensor([1, 7])}, Draws(0, [0, 1]))
    full, _ = objective({name: x[1:] for name, x in batch.items()}, Draws(0, [1]))
    torch.testing.assert_close(loss, full / 2)


def test_clips_that_are_all_real_are_computed_as_without_padding(exact, batch):
    model = perturbed(WorldModel(exact))
    text, mask = torch.randn(2, exact.text.length, exact.text_dim), torch.ones(2, exact.text.length)
    inputs = batch["latents"], torch.full((2, 7), 500.0), text, mask
    assert torch.equal(model(*inputs, frames=torch.tensor([7, 7])), model(*inputs))


@pytest.mark.parametrize("frames", [[3], [3, 8], [0, 7]])
def test_frames_that_do_not_fit_are_refused(frames, exact, batch):
    model = WorldModel(exact)
    text, mask = torch.randn(2, exact.text.length, exact.text_dim), torch.ones(2, exact.text.length)
    with pytest.raises(ValueError, match="frames must be one of 1 to 7 for each of 2 clips"):
        model(batch["latents"], torch.zeros(2, 7), text, mask, frames=torch.tensor(frames))

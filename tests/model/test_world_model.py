"""What the network's options change, and what they do not."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from longtake.model.camera import CameraFeatures
from longtake.model.dit.checkpointing import checkpointed, once
from longtake.model.dit.feed_forward import GLUMBConvTemp
from longtake.model.dit.time_axis import TimeAxis
from longtake.model.dit.world_model import WorldModel
from longtake.model.parity import CASES

pytestmark = pytest.mark.cpu


def model_and_inputs(config):
    torch.manual_seed(0)
    # In bfloat16 a machine's last digit becomes a large one.
    model = WorldModel(dataclasses.replace(config, softmax_dtype="float32"))
    for parameter in model.parameters():  # zero-initialised projections would hide what stands before them
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, dataclasses.replace(CASES[0], config=config).inputs()


@pytest.mark.parametrize("branches", ["both", "plucker", "ucpe", "none"])
def test_a_camera_is_read_as_far_as_the_configuration_says(branches, config):
    model, (*inputs, camera) = model_and_inputs(dataclasses.replace(config, camera_branches=branches))
    assert camera is not None
    turned = CameraFeatures(camera.conditions.roll(1, dims=1), camera.plucker)
    shifted = CameraFeatures(camera.conditions, camera.plucker.roll(1, dims=2))
    with torch.no_grad():
        velocity, by_rays, by_plucker = (model(*inputs, each) for each in (camera, turned, shifted))
        blind = model(*inputs, None)
    assert torch.equal(velocity, by_rays) == (branches in ("plucker", "none"))
    assert torch.equal(velocity, by_plucker) == (branches in ("ucpe", "none"))
    assert torch.equal(velocity, blind) == (branches == "none")


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
        assert plain is recomputed is None or torch.equal(plain, recomputed)


def test_what_is_computed_once_is_kept_until_the_backward_pass():
    factors = [2.0, 3.0]

    def block(x):
        return (x * once(lambda: (torch.tensor(factors.pop(0)), None))[0]).exp()

    x = torch.ones(1, requires_grad=True)
    checkpointed(block, x).backward()
    assert factors == [3.0]
    torch.testing.assert_close(x.grad, 2 * torch.full((1,), 2.0).exp())
    assert block(torch.ones(1)) == torch.full((1,), 3.0).exp()


def test_a_stretch_of_a_clip_that_is_too_long_is_refused_wherever_it_lies(config):
    class Beginning(TimeAxis):
        def place(self, frames):
            return 0, config.max_latent_frames + 1

    model, (latents, timestep, text, mask, _) = model_and_inputs(config)
    with pytest.raises(ValueError, match="exceeds the 1024 positions of this model"):
        model(latents, timestep, text, mask, time_axis=Beginning())


@torch.no_grad()
def test_weights_laid_out_for_kernels_compute_the_same(config):
    model, inputs = model_and_inputs(config)
    expected, names = model(*inputs), list(model.state_dict())
    torch.testing.assert_close(model.lay_out()(*inputs), expected)
    assert list(model.state_dict()) == names
    blocks: Any = model.blocks
    assert all(block.mlp.depth_conv.conv.weight.flatten(1).T.is_contiguous() for block in blocks)
    assert blocks[0].attn.conv_k.weight[:, 0].T.is_contiguous()
    other, _ = model_and_inputs(dataclasses.replace(config))
    for parameter in other.parameters():
        parameter.mul_(1.1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(*inputs), other(*inputs))
    assert not copy.deepcopy(model).requires_grad_(False)(*inputs).requires_grad


@torch.no_grad()
def test_what_weights_laid_out_make_of_the_rays_is_the_same(config):
    model, (latents, _, text, mask, camera) = model_and_inputs(config)

    def rays(of):
        context = of.placed(of.read_text(text), mask, latents.shape[2:], camera, of_rays=of.of_rays())
        return torch.stack(context.rays)

    expected, by_layers = rays(model), model.of_rays()
    torch.testing.assert_close(rays(model.lay_out()), expected)
    assert camera is not None and len(by_layers(camera.plucker)) == len(model.of_rays()(camera.plucker)) == config.depth
    for parameter in model.parameters():
        parameter.mul_(1.1)
    torch.testing.assert_close(rays(model), torch.stack(by_layers(camera.plucker)))
    assert not torch.allclose(rays(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("reach", [1, 2])
def test_what_frames_before_add_to_a_temporal_convolution(reach):
    torch.manual_seed(0)
    mlp = GLUMBConvTemp(8, 16, 2 * reach + 1)
    torch.nn.init.normal_(mlp.t_conv.weight)
    y = torch.randn(2, reach + 4, 6, 8)
    whole = mlp.t_conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, reach:]
    alone = mlp.t_conv(y[:, reach:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(mlp.of_past(y[:, :reach]), (whole - alone)[:, :reach])


@torch.no_grad()
def test_weights_laid_out_stay_parts_of_one_tensor(config):
    model, inputs = model_and_inputs(config)
    expected, bytes_ = model(*inputs), sum(parameter.nbytes for parameter in model.parameters())
    model.lay_out().double().float()
    torch.testing.assert_close(model(*inputs), expected)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    assert sum(storages.values()) < 1.1 * bytes_, "more than what fills rows up"
    blocks: Any = model.blocks
    assert all(block.attn.qkv.weight.data_ptr() == block.attn.joint.weight.data_ptr() for block in blocks)

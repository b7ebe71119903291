"""A world model that starts from SANA-Video, against diffusers' implementation of SANA-Video."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import SanaVideoTransformer3DModel

from longtake.model import WorldModel, convert, presets, sana_video  # type: ignore[attr-defined]
from longtake.model.objectives.flow import FlowObjective
from longtake.model.parity import Case

pytestmark = pytest.mark.cpu


@pytest.fixture
def gdn(config):
    return dataclasses.replace(config, softmax_every=0)


@pytest.fixture
def video(gdn, sana_video_of):
    """No tensor of it is zero, all one or too small to tell."""
    torch.manual_seed(0)
    video = sana_video_of(gdn).eval()
    for parameter in video.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return video


@pytest.fixture
def inputs(gdn):
    """Latents, timesteps, text, mask and camera; one timestep a clip, as SANA-Video has."""
    latents, timestep, *others = Case("video", gdn, 11, 3, 5, batch=2).inputs()
    return latents, torch.tensor([[321.0], [750.0]]).expand_as(timestep), *others


@torch.no_grad()
def velocity_of(video, latents, timestep, text, mask, _):
    return video(latents, text, timestep[:, 0], encoder_attention_mask=mask.float(), return_dict=False)[0]


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def outputs_of(model, names):
    """What the modules of those names will give."""
    found = {}
    for name in names:
        hook = lambda _, __, output, name=name: found.update({name: output})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    return found


def test_a_gdn_that_forgets_and_corrects_nothing_is_sana_video_in_every_module(gdn, video, inputs, tmp_path):
    video.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    model = WorldModel(gdn).eval()
    place = sana_video.find(tmp_path)
    assert place and len(list(place.glob("*.safetensors"))) > 1
    sana_video.start(model, place)
    for block in model.blocks:
        block.attn.beta_proj.bias.data.fill_(40)
        block.attn.A_log.data.fill_(-40)
        block.attn.k_norm.weight.data *= 1e-3  # too small for the delta rule; a mean weighed by keys stays the same
    pairs = {"t_embedder": "time_embed.emb", "t_block": "time_embed.linear", "attention_y_norm": "caption_norm"}
    for number in range(gdn.depth):
        ours, theirs = f"blocks.{number}.", f"transformer_blocks.{number}."
        pairs |= {ours + "attn": theirs + "attn1", ours + "cross_attn": theirs + "attn2", ours + "mlp": theirs + "ff"}
    ours, theirs = outputs_of(model, pairs), outputs_of(video, pairs.values())
    with torch.no_grad():
        assert difference(model(*inputs), velocity_of(video, *inputs)) < 1e-5
    for name, their_name in pairs.items():
        found = torch.stack(ours[name]).sum(0) if name.endswith("mlp") else ours[name]  # the block adds the two up
        found = found[:, 0] if name.startswith("t_") else found  # of all frames
        assert difference(found, theirs[their_name].reshape(found.shape)) < 1e-5, name


def test_training_starts_close_to_sana_video_and_blind_to_cameras(gdn, video, inputs, tmp_path):
    video.save_pretrained(tmp_path)
    objective = FlowObjective(gdn)
    objective.load(tmp_path)
    spread = WorldModel(gdn)  # gates as for a training from nothing
    spread.load_state_dict(sana_video.from_sana_video(video.state_dict(), gdn), strict=False)
    with torch.no_grad():
        started, blind, other = objective.world_model(*inputs), objective.world_model(*inputs[:-1]), spread(*inputs)
    expected = velocity_of(video, *inputs)
    attention: Any = objective.world_model.get_submodule("blocks.2.attn")
    gates = attention.gates(torch.randn(1, 6, gdn.hidden_size), 3)
    assert all(torch.allclose(gate, torch.tensor(0.9933), atol=1e-4) for gate in gates[:2])
    assert torch.equal(started, blind)
    assert difference(started, expected) < 0.04 < 0.06 < difference(other, expected)


def test_every_tensor_of_the_full_size_file_is_taken_or_of_its_latents(sana_video_of):
    config = dataclasses.replace(presets.get("sana-wm"), softmax_every=0)
    with torch.device("meta"):
        released = SanaVideoTransformer3DModel(mlp_ratio=3.0).state_dict()  # on 16 channels, in patches of 2 x 2
        on_our_latents = sana_video_of(config).state_dict()
    for tensors in (released, on_our_latents):
        taken = sana_video.from_sana_video(tensors, config)
        copies = sum(tensor.numel() for name, tensor in taken.items() if "_cam" in name)
        left = sum(
            t.numel() for name, t in tensors.items() if tensors is released and name.startswith(("patch", "proj"))
        )
        assert sum(t.numel() for t in taken.values()) - copies == sum(t.numel() for t in tensors.values()) - left
        shapes = convert.expected_shapes(config)
        assert all(tensor.shape == shapes[name] for name, tensor in taken.items())
    assert len(released) == len(on_our_latents) == 496


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("caption_norm.weight"), "caption_norm.weight of SANA-Video is missing"),
        (lambda d: d.update(stray=torch.zeros(1)), "stray does not belong to a SANA-Video"),
        (
            lambda d: d.update({"transformer_blocks.1.attn2.to_v.weight": torch.zeros(64, 3)}),
            r"1.attn2.to_v.weight of SANA-Video has shape \(64, 3\), this model needs \(64, 64\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(gdn, video, change, message):
    tensors = dict(video.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        sana_video.from_sana_video(tensors, gdn)

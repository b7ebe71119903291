"""The network against diffusers' SanaWMTransformer3DModel, with the same random weights."""

import dataclasses

import pytest
import torch
from diffusers import SanaWMTransformer3DModel

from longtake.model import WorldModel, convert, presets  # type: ignore[attr-defined]  # made in longtake/__init__.py
from longtake.model.dit.attention import GDNAttention, Positions
from longtake.model.dit.positions import RotaryTable
from longtake.model.parity import CASES, diffusers_model, relative_error

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_forward_pass_equals_diffusers(case):
    assert relative_error(case) < 1e-4


def test_state_dicts_convert_there_and_back(config):
    theirs = diffusers_model(config).state_dict()
    ours = convert.from_diffusers(theirs, config)
    back = convert.to_diffusers(ours, config)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in back)
    official = convert.to_official(ours, config)
    wrapped = {
        "generator": {f"model.{name}": tensor for name, tensor in official.items()}
        | {"model.pos_embed": torch.zeros(1)}
    }
    assert convert.from_official(wrapped, config).keys() == ours.keys()


def test_every_tensor_of_the_full_size_files_is_accounted_for():
    config = presets.get("sana-wm")
    shapes = convert.expected_shapes(config)
    assert len(shapes) + len({"pos_embed"}) == 872
    with torch.device("meta"):
        theirs = SanaWMTransformer3DModel().state_dict()
        ours = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted = convert.to_diffusers(ours, config)
    assert {name: tensor.shape for name, tensor in converted.items()} == {name: t.shape for name, t in theirs.items()}
    counted = sum(shape.numel() for name, shape in shapes.items() if name != "y_embedder.y_embedding")
    assert counted == 2_661_800_468


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("blocks.1.attn.A_log"), "blocks.1.attn.A_log is missing"),
        (lambda d: d.update(stray=torch.zeros(1)), "stray does not belong"),
        (
            lambda d: d.update({"blocks.0.attn.conv_k.weight": torch.zeros(3, 1, 4)}),
            r"conv_k.weight has shape \(3, 1, 4\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(config, change, message):
    tensors = dict(WorldModel(config).state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert.from_official(tensors, config)


def test_the_options_of_the_releases_change_the_output(config):
    """Each named difference between the public releases is alive."""
    changes = (dict(ucpe_downscale=False), dict(softmax_scale_camera="padded"), dict(softmax_scale_main=0.3))
    base = dataclasses.replace(config, hidden_size=48, num_heads=2, head_dim=24, softmax_scale_camera="head_dim")
    case = dataclasses.replace(CASES[0], config=base)
    assert relative_error(case, ours=base, theirs=base) == 0
    for change in changes:
        assert relative_error(case, ours=dataclasses.replace(base, **change), theirs=base) > 1e-3


def test_gradients_reach_every_parameter_that_the_release_trains(config):
    model = WorldModel(config)
    case = dataclasses.replace(CASES[0], config=config)
    inputs = case.inputs()
    for parameter in model.parameters():  # zero-initialised projections would hide what stands before them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model(*inputs).square().sum().backward()
    unused = {"raymap_embedder", "y_embedding"}
    gates = {"beta_proj", "gate_proj", "A_log", "dt_bias"}
    for name, parameter in model.named_parameters():
        softmax_gate = ".3." in name and any(gate in name for gate in gates)
        expected = not softmax_gate and not any(part in name for part in unused)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name


@pytest.mark.parametrize("contractive", [True, False])
def test_a_contractive_state_stays_finite_over_any_length(config, contractive):
    """Keys gathered in one head, which the normalisation over all heads allows, make the plain state explode."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, contractive_gdn=contractive)
    attention = GDNAttention(config)
    with torch.no_grad():
        attention.k_norm.weight[config.head_dim :] = 0
        attention.k_norm.weight[: config.head_dim] = 8
        attention.A_log.fill_(-9)  # forget nothing
        frames, tokens = 200, 6
        rope, _ = RotaryTable(config.head_dim, frames)((frames, 2, 3), torch.device("cpu"))
        x = torch.randn(1, frames * tokens, config.hidden_size)
        out = attention(x, Positions(frames, rope, rope))
    assert bool(torch.isfinite(out).all()) == contractive

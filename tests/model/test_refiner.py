import pytest
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel

from longtake.model.refiner import Refiner

pytestmark = pytest.mark.cpu


@pytest.fixture
def inputs(config):
    return torch.randn(2, config.latent_channels, 3, 2, 3), torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)


def test_no_audio_parameter_is_kept(config):
    names = [name for name, _ in Refiner(config).named_parameters()]
    assert names and not [name for name in names if "audio" in name or "a2v" in name]


def test_parameter_names_are_those_of_the_public_transformer(config):
    refiner = Refiner(config)
    public = {name for name, _ in SanaWMLTX2RefinerTransformer3DModel(**refiner.transformer.config).named_parameters()}
    assert {name for name, _ in refiner.transformer.named_parameters()} < public


def test_refining_keeps_the_first_frame_and_changes_the_others(config, inputs):
    torch.manual_seed(0)
    latents, text, mask = inputs
    refined = Refiner(config).refine(latents, torch.randn_like(latents), text, mask)
    assert torch.equal(refined[:, :, 0], latents[:, :, 0])
    assert ((refined - latents)[:, :, 1:].abs().amax((1, 3, 4)) > 0.01).all()


def test_refining_starts_from_the_truncated_sigma(config, inputs):
    latents, text, mask = inputs
    refiner, seen = Refiner(config), []
    refiner.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    refiner.refine(latents, torch.randn_like(latents), text, mask)
    assert [t.max().item() for t in seen] == pytest.approx([500, 200])
    assert all((t.reshape(2, 3, 6)[:, 0] == 0).all() for t in seen)

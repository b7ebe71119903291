import dataclasses

import pytest
import torch

from longtake.model.refiner import Refiner, RefinerStream
from longtake.model.refiner.parity import REFINER_CASES, diffusers_transformer, of_same_weights

pytestmark = pytest.mark.cpu


@pytest.fixture
def inputs(config):
    return torch.randn(2, config.latent_channels, 3, 2, 3), torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)


def by_blocks(config, **fields):
    """A refiner of blocks of 3 latent frames."""
    torch.manual_seed(0)
    return Refiner(
        dataclasses.replace(config, refiner=dataclasses.replace(config.refiner, **{"block_size": 3, **fields}))
    )


@pytest.mark.parametrize("case", REFINER_CASES, ids=lambda case: case.name)
def test_a_refinement_by_blocks_equals_diffusers(case):
    assert case.relative_error() < 1e-5


def test_a_whole_clip_equals_diffusers(config, inputs):
    torch.manual_seed(0)
    latents, text, mask = inputs
    mask[:, 7:] = False
    theirs = diffusers_transformer(config)
    ours = of_same_weights(config, theirs)
    assert not [name for name in ours.transformer.state_dict() if "audio" in name]
    timestep = torch.tensor([[0, 300.5, 300.5], [0, 900, 20]])
    turned = theirs.build_rotary_emb_for_absolute_positions(2, [0, 1, 2], 2, 3, latents.device, config.fps)
    expected = theirs(
        latents.flatten(2).transpose(1, 2), text, timestep.repeat_interleave(6, 1), turned, mask, return_dict=False
    )[0]
    found = ours(latents, timestep, text, mask).flatten(2).transpose(1, 2)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_refining_keeps_the_first_frame_and_changes_the_others(config, inputs):
    torch.manual_seed(0)
    latents, text, mask = inputs
    refined = Refiner(config).refine(latents, torch.randn_like(latents), text, mask)
    assert torch.equal(refined[:, :, 0], latents[:, :, 0])
    assert ((refined - latents)[:, :, 1:].abs().amax((1, 3, 4)) > 0.01).all()


def test_refining_starts_from_the_truncated_sigma(config, inputs):
    latents, text, mask = inputs
    refiner, seen = Refiner(config), []
    refiner.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    refiner.refine(latents, torch.randn_like(latents), text, mask)
    assert [t.max().item() for t in seen] == pytest.approx([500, 200])
    assert all((t[:, 0] == 0).all() for t in seen)


def test_parts_of_any_length_are_refined_as_the_whole(config):
    refiner = by_blocks(config, window=6)
    latents, noise = torch.randn(2, 1, config.latent_channels, 12, 2, 3)
    text, mask = torch.randn(1, 12, 32), torch.ones(1, 12, dtype=torch.bool)
    whole = refiner.refine(latents, noise, text, mask)
    blocks = iter(noise[:, :, 1:].split(3, 2))
    stream = RefinerStream(refiner, text, mask, lambda number, x: next(blocks))
    parts = list(stream(latents.split([4, 1, 5, 2], 2)))
    assert [part.shape[2] for part in parts] == [1, 3, 3, 3, 2]
    assert torch.equal(torch.cat(parts, 2), whole)
    rest = iter(noise[:, :, 7:].split(3, 2))
    again = RefinerStream(refiner, text, mask, lambda number, x: next(rest), known=parts[1:3])
    assert torch.equal(torch.cat(list(again([latents])), 2), whole)


@pytest.mark.parametrize(("size", "window", "frames"), [(3, 6, 14), (2, 11, 7), (3, 2, 8), (3, 5, 3)])
def test_a_block_in_training_sees_what_a_stream_shows_it(size, window, frames, config, monkeypatch):
    refiner = by_blocks(config, block_size=size, window=window, num_layers=2)
    clean, noisy = torch.randn(2, 2, config.latent_channels, frames, 2, 3)
    text, mask = torch.randn(2, 12, 32), torch.rand(2, 12) < 0.7
    mask[:, 0] = True
    timestep = 500 * torch.rand(2, frames)
    made = refiner.by_blocks(clean, noisy, timestep, text, mask)
    assert made.shape == clean.shape and not made[:, :, 0].any()

    found = [torch.zeros_like(clean[:, :, :1])]
    parts = zip(*(x.split(size, dim) for x, dim in ((clean[:, :, 1:], 2), (timestep[:, 1:], 1))), strict=True)

    def pretend(latents, noise, velocity, frozen):
        """The block was refined to its clean frames."""
        true, at = next(parts)
        found.append(velocity(latents, at))
        return true

    monkeypatch.setattr(refiner, "_denoised", pretend)
    stream = RefinerStream(refiner, text, mask)
    stream.begin(clean[:, :, :1])
    for block in noisy[:, :, 1:].split(size, 2):
        stream.refine(block, block)
    torch.testing.assert_close(made, torch.cat(found, 2), rtol=1e-5, atol=1e-5)


def test_training_by_blocks_is_of_each_block_s_own_sigma_and_its_gradient_is_checkpointed_alike(config):
    refiner = by_blocks(config, num_layers=2)
    seen, (clean, noisy) = [], torch.randn(2, 1, config.latent_channels, 8, 2, 3)
    refiner.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    grads = []
    for refiner.transformer.checkpoint_blocks in (False, True):
        refiner.zero_grad()
        timestep, text = torch.arange(8.0)[None] * 50, torch.ones(1, 12, 32)
        refiner.by_blocks(clean, noisy, timestep, text, torch.ones(1, 12)).square().mean().backward()
        grads.append([p.grad for p in refiner.parameters()])
    assert seen[0][0].tolist() == [0.0] * 7 + [50.0 * frame for frame in range(1, 8)]
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert any(grad.any() for grad in grads[0])


def test_what_a_stream_keeps_does_not_grow_and_goes_on_as_it_was(config):
    refiner = by_blocks(config, window=5)
    text, mask = torch.randn(1, 12, 32), torch.ones(1, 12, dtype=torch.bool)
    stream, sizes = RefinerStream(refiner, text, mask), []
    latents = torch.randn(1, config.latent_channels, 16, 2, 3)
    stream.begin(latents[:, :, :1])
    for block in latents[:, :, 1:].split(3, 2):
        before = stream.past
        made = stream.refine(block, torch.randn(block.shape, generator=torch.Generator().manual_seed(1)))
        sizes.append(stream.past.nbytes)
    assert len(set(sizes[1:])) == 1
    again = RefinerStream(refiner, text, mask, past=before)
    assert torch.equal(again.refine(block, torch.randn(block.shape, generator=torch.Generator().manual_seed(1))), made)


def test_a_window_of_nothing_is_refused(config):
    with pytest.raises(ValueError, match="window 1 must be at least 2|at least 2"):
        by_blocks(config, window=1)

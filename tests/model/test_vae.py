import dataclasses

import pytest
import torch

from longtake.model.vae import (
    build_vae,
    decode_latents,
    denormalise,
    encode_frames,
    make_causal,
    normalise,
    to_pixels,
    to_uint8,
)

pytestmark = pytest.mark.cpu


@pytest.fixture
def vae(config):
    torch.manual_seed(0)
    return build_vae(config).eval()


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_decoding_in_chunks_equals_decoding_at_once(config, chunk, padding):
    torch.manual_seed(0)
    vae = build_vae(dataclasses.replace(config, vae=config.vae | {"decoder_spatial_padding_mode": padding})).eval()
    latents = torch.randn(1, config.latent_channels, 5, 2, 3)
    whole = to_uint8(vae.decode(denormalise(vae, latents), return_dict=False)[0]).int()
    pieces = torch.cat(list(decode_latents(vae, latents, chunk=chunk)), dim=1).int()
    assert pieces.shape == (1, 33, 64, 96, 3)
    assert (pieces - whole).abs().max() <= 1  # rounding to 8 bits


def test_decoding_leaves_the_autoencoder_as_it_was(vae, config):
    latents = torch.randn(1, config.latent_channels, 3, 2, 3)
    before = vae.decode(latents).sample
    list(decode_latents(vae, latents, chunk=1))
    assert torch.equal(vae.decode(latents).sample, before)


def test_an_interrupted_decode_does_not_leak_into_the_next(vae, config):
    latents = torch.randn(1, config.latent_channels, 3, 2, 3)
    expected = torch.cat(list(decode_latents(vae, latents, chunk=1)), dim=1)
    interrupted = decode_latents(vae, torch.randn_like(latents), chunk=1)
    next(interrupted)
    interrupted.close()
    assert torch.equal(torch.cat(list(decode_latents(vae, latents, chunk=1)), dim=1), expected)


def test_frames_become_one_latent_frame_and_one_for_each_eight(vae):
    assert encode_frames(vae, torch.zeros(2, 17, 64, 96, 3, dtype=torch.uint8)).shape[2:] == (3, 2, 3)


def test_a_frame_count_that_does_not_fit_is_refused(vae):
    with pytest.raises(ValueError, match="8 k \\+ 1"):
        encode_frames(vae, torch.zeros(1, 16, 64, 96, 3, dtype=torch.uint8))


def test_normalisation_and_pixels_round_trip(vae):
    vae.latents_mean.uniform_(-1, 1)
    vae.latents_std.uniform_(0.5, 2)
    latents = torch.randn(2, vae.config.latent_channels, 3, 2, 3)
    torch.testing.assert_close(denormalise(vae, normalise(vae, latents)), latents)
    frames = torch.randint(0, 256, (1, 9, 4, 6, 3), dtype=torch.uint8)
    assert torch.equal(to_uint8(to_pixels(frames)), frames)


def test_a_decoder_that_becomes_causal_sees_nothing_later_and_starts_near_what_it_was(config):
    torch.manual_seed(0)
    symmetric = build_vae(dataclasses.replace(config, vae=config.vae | {"decoder_causal": False}))
    causal, untouched = build_vae(config), build_vae(config)
    for vae in (causal, untouched):
        vae.load_state_dict(symmetric.state_dict())
    make_causal(causal)
    still = torch.randn(1, config.latent_channels, 1, 2, 3).expand(-1, -1, 4, -1, -1)
    moved = still.clone()
    moved[:, :, 2:] += 1
    with torch.no_grad():
        true, before, other, after = (
            vae.decode(latents, return_dict=False)[0]
            for vae, latents in ((symmetric, still), (causal, still), (untouched, still), (causal, moved))
        )
    assert (before - true).norm() < 0.8 * (other - true).norm()
    assert torch.equal(before[:, :, :9], after[:, :, :9]) and not torch.allclose(before[:, :, 9:], after[:, :, 9:])

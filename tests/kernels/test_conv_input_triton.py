"""What a causal convolution reads: the definition by diffusers' own modules, and Triton's against the definition."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm

from longtake.kernels import conv_input as operator
from longtake.kernels.conv_input import reference, triton_conv_input
from longtake.model.vae import build_vae, decode_more

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter is wrong in bfloat16
TOLERANCE = torch.finfo(HALF).eps  # its last bit
LAST = torch.channels_last_3d
EPS = 1e-8


def frames(*shape):
    return 3 * torch.randn(shape)


def test_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 5.0]]).view(1, 2, 1, 1, 2)  # two positions, of channels (3, 0) and (4, 5)
    past = torch.tensor([7.0, 8.0, 9.0, 10.0]).view(1, 2, 1, 1, 2)
    found, left = operator.conv_input(x, past, reach=1, border=(0, 1))
    first = [[[8.0, 7.0, 8.0, 7.0], [4.0, 3.0, 4.0, 3.0]], [[10.0, 9.0, 10.0, 9.0], [5.0, 0.0, 5.0, 0.0]]]
    assert found[0, :, :, 0].tolist() == first and torch.equal(left, x)
    found, left = operator.conv_input(x, None, reach=2, border=(0, 0), eps=0.0)
    normed = F.silu(torch.tensor([[3 / 4.5**0.5, 4 / 20.5**0.5], [0.0, 5 / 20.5**0.5]]))
    torch.testing.assert_close(found[0, :, :, 0], normed[:, None].expand(-1, 3, -1))
    assert torch.equal(left, found[:, :, 1:])


def test_the_definition_is_what_the_modules_compute():
    x, past = frames(2, 6, 3, 4, 5), frames(2, 6, 2, 4, 5)
    new = torch.nn.SiLU()(PerChannelRMSNorm()(x))
    true = F.pad(torch.cat([past, new], dim=2), (1, 1, 1, 1, 0, 0), mode="reflect")
    found, left = reference.conv_input(x, past, 2, (1, 1), PerChannelRMSNorm().eps)
    assert torch.equal(found, true) and torch.equal(left, new[:, :, 1:])


def test_a_border_wider_than_what_it_reflects_is_refused():
    with pytest.raises(ValueError, match="2 x 5 positions"):
        operator.conv_input(frames(1, 3, 1, 2, 5), None, 2, (2, 1))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "memory_format"),
    [(torch.float32, 1e-5, torch.contiguous_format), (torch.float32, 1e-5, LAST), (HALF, TOLERANCE, LAST)],
)
@pytest.mark.parametrize(
    ("sizes", "reach", "border"),
    [
        ((2, 24, 3, 3, 5), 2, (1, 1)),
        ((1, 130, 1, 2, 4), 2, (1, 1)),  # the past outlasts a call
        ((1, 5, 2, 7, 3), 1, (2, 0)),
        ((1, 64, 2, 9, 11), 2, (0, 0)),
    ],
)
def test_conv_input(device, monkeypatch, sizes, reach, border, dtype, tolerance, memory_format, eps, begun):
    monkeypatch.setattr(triton_conv_input, "_ELEMENTS", 512)  # several programs a frame
    b, c, t, h, w = sizes
    x = frames(*sizes).to(device, dtype, memory_format=memory_format)
    past = frames(b, c, reach, h, w).to(device, dtype, memory_format=memory_format) if begun else None
    found = triton_conv_input.conv_input(x, past, reach, border, eps)
    for ours, true in zip(found, reference.conv_input(x, past, reach, border, eps), strict=True):
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=LAST)
        if eps is None:
            assert torch.equal(ours, true)
        torch.testing.assert_close(ours, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [None, EPS])
def test_a_part_of_a_larger_video(device, eps):
    """As an upsampler leaves it, whose first frame is dropped."""
    whole = frames(2, 24, 4, 3, 5).to(device, memory_format=LAST)
    x, past = whole[:, :, 1:], whole[:, :, :1].expand(-1, -1, 2, -1, -1)
    found = triton_conv_input.conv_input(x, past, 2, (1, 1), eps)
    for ours, true in zip(found, reference.conv_input(x, past, 2, (1, 1), eps), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_decoder_through_the_kernel(device, small_config, padding, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = dataclasses.replace(small_config, vae=small_config.vae | {"decoder_spatial_padding_mode": padding})
    vae = build_vae(config).to(device)
    latents, results = torch.randn(1, config.latent_channels, 3, 2, 3).to(device), []
    for triton in (False, True):
        monkeypatch.setattr(operator, "fused", lambda *_, triton=triton: triton)
        first, past = decode_more(vae, latents[:, :, :2])
        more, left = decode_more(vae, latents[:, :, 2:], past)
        results.append((torch.cat([first, more], dim=1).int(), left))
    (true, true_left), (found, found_left) = results
    assert true.float().std() > 1 and (found - true).abs().max() <= 1  # rounding to 8 bits
    assert true_left.keys() == found_left.keys()
    for name, kept in true_left.items():
        torch.testing.assert_close(found_left[name], kept, rtol=1e-3, atol=1e-4)
        assert found_left[name].is_contiguous(memory_format=LAST), name  # what a convolution read was, too

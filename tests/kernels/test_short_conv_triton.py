"""Triton's short convolution against its definition: values and every gradient."""

import pytest
import torch

from longtake.kernels.short_conv import triton_conv
from longtake.kernels.short_conv.reference import short_conv

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter is wrong in bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, 1e-2)])
@pytest.mark.parametrize("kernel_size", [1, 4])
@pytest.mark.parametrize("sizes", [(2, 17, 3, 24), (1, 2, 40, 70), (1, 1, 1, 16)])
def test_short_conv(device, monkeypatch, sizes, kernel_size, dtype, tolerance):
    for name in ("_PROGRAMS", "_PROGRAMS_BACKWARD"):
        monkeypatch.setattr(triton_conv, name, 3)  # each has several strips
    torch.manual_seed(0)
    b, t, s, c = sizes
    x = torch.randn(b, t, s, 3 * c).to(device, dtype).chunk(3, dim=-1)[1].requires_grad_()
    weight = torch.randn(c, 1, kernel_size).to(device, dtype).requires_grad_()
    by = torch.randn(sizes).to(device, dtype)
    floats = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    found, true = triton_conv.ShortConv.apply(x, weight), short_conv(*floats)
    ours = found, *torch.autograd.grad(found, (x, weight), by)
    theirs = true, *torch.autograd.grad(true, floats, by.float())
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype
        scale = tolerance * their.abs().max().item()
        torch.testing.assert_close(our.float(), their, rtol=tolerance, atol=scale)


def test_frames_before_are_convolved_too(device):
    x = torch.randn(2, 3, 5, 72).to(device, HALF).chunk(3, dim=-1)[1]
    weight, before = torch.randn(24, 1, 4).to(device, HALF), torch.randn(2, 3, 5, 24).to(device, HALF)
    with torch.no_grad():
        found = triton_conv.ShortConv.apply(x, weight, before)
    true = short_conv(torch.cat([before, x], 1).float(), weight.float())[:, 3:]
    torch.testing.assert_close(found.float(), true, rtol=1e-2, atol=1e-2 * true.abs().max().item())
    torch.testing.assert_close(short_conv(x.float(), weight.float(), before.float()), true)

"""Triton's short convolution against its definition: values and every gradient."""

import pytest
import torch

from longtake.kernels.short_conv.reference import short_conv
from longtake.kernels.short_conv.triton_conv import ShortConv

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu


@pytest.mark.parametrize("kernel_size", [1, 4])
@pytest.mark.parametrize("sizes", [(2, 5, 3, 24), (1, 2, 40, 70), (1, 1, 1, 16)])
def test_short_conv(device, sizes, kernel_size):
    torch.manual_seed(0)
    b, t, s, c = sizes
    x = torch.randn(b, t, s, 3 * c).to(device).chunk(3, dim=-1)[1].requires_grad_()
    weight = torch.randn(c, 1, kernel_size, device=device, requires_grad=True)
    found, true = ShortConv.apply(x, weight), short_conv(x, weight)
    torch.testing.assert_close(found, true)
    by = torch.randn(sizes).to(device)
    for ours, theirs in zip(*(torch.autograd.grad((y * by).sum(), (x, weight)) for y in (found, true)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

"""Triton's `glu_conv` against its definition: values and every gradient."""

import pytest
import torch

from longtake.kernels.glu_conv.reference import glu_conv
from longtake.kernels.glu_conv.triton_glu_conv import GLUConv

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu


@pytest.mark.parametrize("sizes", [(2, 3, 11, 6), (1, 1, 1, 130), (3, 2, 4, 24)])
def test_glu_conv(device, sizes):
    torch.manual_seed(0)
    *grid, inner = sizes
    x = torch.randn(*grid, 2 * inner, device=device, requires_grad=True)
    weight = torch.randn(2 * inner, 1, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(2 * inner, device=device, requires_grad=True)
    inputs = x, weight, bias
    found, true = GLUConv.apply(*inputs), glu_conv(*inputs)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    by = torch.randn(true.shape).to(device)
    for ours, theirs in zip(*(torch.autograd.grad((y * by).sum(), inputs) for y in (found, true)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

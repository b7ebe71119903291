"""Triton's `glu_conv` against its definition: values and every gradient."""

import pytest
import torch

from longtake.kernels.glu_conv import triton_glu_conv
from longtake.kernels.glu_conv.reference import glu_conv

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter is wrong in bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (HALF, 1e-2)])
@pytest.mark.parametrize("sizes", [(2, 3, 11, 6), (1, 1, 1, 130), (3, 2, 4, 24), (1, 4, 3, 64)])
def test_glu_conv(device, monkeypatch, sizes, dtype, tolerance):
    monkeypatch.setattr(triton_glu_conv, "_PROGRAMS", 2)  # each has several strips
    torch.manual_seed(0)
    *grid, inner = sizes
    shapes = (*grid, 2 * inner), (2 * inner, 1, 3, 3), (2 * inner,), sizes
    *inputs, by = (torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes)
    floats = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found, true = triton_glu_conv.GLUConv.apply(*inputs), glu_conv(*floats)
    ours = found, *torch.autograd.grad(found, inputs, by)
    theirs = true, *torch.autograd.grad(true, floats, by.float())
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype
        scale = tolerance * their.abs().max().item()
        torch.testing.assert_close(our.float(), their, rtol=tolerance, atol=scale)

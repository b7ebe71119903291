"""`rounded` in Triton: a row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.float8.reference import LARGEST, Rounded

_MOST = 16_384  # channels of a row, which a program holds in registers


@triton.jit
def _round(x_ptr, to_ptr, scale_ptr, row, C: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, TOP: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + number * row + c, c < C, 0.0).to(tl.float32)
    if GELU:
        # 1 + tanh(y) is twice the sigmoid of 2 y.
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / TOP
    tl.store(to_ptr + number * C + c, (x / scale).to(to_ptr.dtype.element_ty), c < C)
    tl.store(scale_ptr + number, scale)


def takes(x: Tensor) -> bool:
    return x.shape[-1] <= _MOST


def rounded(x: Tensor, gelu: bool) -> Rounded:
    """Of the rows of x (..., C)."""
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, device=x.device)
    block = triton.next_power_of_2(x.shape[-1])
    _round[len(rows),](
        rows, values, scale, rows.stride(0), x.shape[-1], block, gelu, LARGEST, num_warps=max(1, min(16, block // 512))
    )
    return Rounded(values, scale)

"""Linear layers of factors in float8_e4m3fn, which have 3 bits of mantissa: an approximation, in half the memory of
bfloat16 and, where tensor cores multiply float8, at nearly twice its speed.

A token of the inputs and an output channel of the weights have a scale each, taken from their largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.float8 import reference
from longtake.kernels.float8.reference import Rounded
from longtake.kernels.launch import fused

CHANNELS = 16  # that layers have a multiple of, before and after


def rounded(x: Tensor, gelu: bool = False) -> Rounded:
    """The rows of x (..., C), or of its GELU, see `reference.rounded`: scale (..., 1)."""
    if fused(x):
        from longtake.kernels.float8 import triton_round

        if triton_round.takes(x):
            with torch.cuda.device_of(x):
                return triton_round.rounded(x, gelu)
    return reference.rounded(x, gelu=gelu)


def linear(x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.linear`. On a GPU, one that `multiplies`, what comes out has been rounded to bfloat16."""
    if not x.values.is_cuda:
        return reference.linear(x, weight, bias, dtype)
    half = torch.bfloat16
    product = torch._scaled_mm(
        x.values.flatten(0, -2), weight.values.T, x.scale.flatten(0, -2), weight.scale.T,
        None if bias is None else bias.to(half), out_dtype=half, use_fast_accum=True,
    )  # fmt: skip
    return product.view(*x.values.shape[:-1], -1).to(dtype)


def multiplies(device: torch.device) -> bool:
    """Whether float8 is multiplied there: on the CPU by the definition, on NVIDIA's GPUs from Ada and Hopper on."""
    return device.type == "cpu" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)

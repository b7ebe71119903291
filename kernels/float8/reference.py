"""Products of factors that were rounded to float8_e4m3fn, a row at a time: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


class Rounded(NamedTuple):
    """values in float8_e4m3fn, contiguous; scale in float32, as large in the dimensions that do not share one. Their
    product is what was rounded.
    """

    values: Tensor
    scale: Tensor


def rounded(x: Tensor, dims: tuple[int, ...] = (-1,), gelu: bool = False) -> Rounded:
    """x, or its GELU by the tanh approximation, each part along `dims` with the scale that its largest magnitude
    needs.
    """
    if gelu:
        x = F.gelu(x.float(), approximate="tanh")
    scale = x.abs().amax(dims, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return Rounded((x / scale).to(torch.float8_e4m3fn).contiguous(), scale)


def linear(x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (..., C) times weight (D, C), plus bias (D): (..., D), summed in float32."""
    factors = x.values.float() * x.scale, weight.values.float() * weight.scale
    return F.linear(*factors, None if bias is None else bias.float()).to(dtype)

"""Short depthwise convolution over time."""

from __future__ import annotations

from torch import Tensor

from longtake.kernels.launch import apply, fused
from longtake.kernels.short_conv import reference


def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The symmetric convolution, see `reference.short_conv`; Triton computes it where `launch.fused` says so."""
    if fused(x):
        from longtake.kernels.short_conv.triton_conv import ShortConv

        return apply(ShortConv, x, weight)
    return reference.short_conv(x, weight)

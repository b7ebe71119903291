"""What lies between the two projections of the feed-forward: SiLU, depthwise convolution, gate."""

from __future__ import annotations

from torch import Tensor

from longtake.kernels.glu_conv import reference
from longtake.kernels.launch import apply, fused


def glu_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference.glu_conv`; Triton computes it where `launch.fused` says so."""
    if fused(x):
        from longtake.kernels.glu_conv.triton_glu_conv import GLUConv

        return apply(GLUConv, x, weight.to(x.dtype), bias.to(x.dtype))
    return reference.glu_conv(x, weight, bias)

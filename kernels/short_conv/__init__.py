"""Short depthwise convolution over time."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.launch import apply, fused
from longtake.kernels.short_conv import reference


def short_conv(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """The symmetric convolution, see `reference.short_conv`; Triton computes it where `launch.fused` says so, with
    frames `before` where nobody wants a gradient.
    """
    if fused(x) and (before is None or not torch.is_grad_enabled()):
        from longtake.kernels.short_conv.triton_conv import ShortConv

        return apply(ShortConv, x, weight, before)
    return reference.short_conv(x, weight, before)

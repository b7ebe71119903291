"""What a causal 3-D convolution of a video reads: normed, after frames of the past, with a reflected border."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.conv_input import reference
from longtake.kernels.launch import fused


def conv_input(
    x: Tensor, past: Tensor | None, reach: int, border: tuple[int, int], eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.conv_input`; Triton computes it where `launch.fused` says so and nobody wants a gradient, and
    leaves both results channels last. ValueError for a border that is wider than what it reflects.
    """
    if border[0] >= x.shape[3] or border[1] >= x.shape[4]:
        raise ValueError(
            f"frames of {x.shape[3]} x {x.shape[4]} positions have no {border[0]} x {border[1]} to reflect"
        )
    if fused(x) and not torch.is_grad_enabled():
        from longtake.kernels.conv_input.triton_conv_input import conv_input as by_triton

        with torch.cuda.device_of(x):
            return by_triton(x, past, reach, border, eps)
    return reference.conv_input(x, past, reach, border, eps)

"""SiLU, a 3 x 3 depthwise convolution over each frame, and the gate: the definition (SANA-WM section 1.11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_ELEMENTS = 1 << 30  # convolutions index with 32 bits


def glu_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (frames, height, width, 2 I), of which the last I channels are the gate's; weight (2 I, 1, 3, 3), bias (2 I).

    Outside a frame are zeros. (frames, height, width, I) in x's dtype: c = conv(silu(x)), value silu(gate) of c.
    """
    frames = max(1, _MAX_ELEMENTS // x[0].numel())
    parts = [_of_some_frames(part, weight, bias) for part in x.split(frames)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_some_frames(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    images = F.silu(x).permute(0, 3, 1, 2)
    value, gate = F.conv2d(images, weight, bias, padding=1, groups=len(weight)).chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1)

"""What a causal 3-D convolution of a video reads: the definition (LTX-2's autoencoder)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.launch import wide


def conv_input(
    x: Tensor, past: Tensor | None, reach: int, border: tuple[int, int], eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, C, T, H, W) after the past (B, C, reach, H, W), in a border of (rows, columns) that mirrors each frame
    about its outermost positions: (B, C, reach + T, H + 2 rows, W + 2 columns); and the past of what follows, as
    `past`, without a border. Both in x's dtype.

    With eps, silu(x / sqrt(mean over C of x^2 + eps)) takes x's place, computed in float32 and rounded once; the past
    is of this already. Without a past the first frame is repeated.
    """
    if eps is not None:
        values = wide(x)
        rms = torch.sqrt(torch.mean(values**2, dim=1, keepdim=True) + eps)
        x = F.silu(values / rms).to(x.dtype)
    if past is None:
        past = x[:, :, :1].expand(-1, -1, reach, -1, -1)
    frames = torch.cat([past, x], dim=2)
    left = frames[:, :, frames.shape[2] - reach :].clone()
    rows, columns = border
    if rows or columns:
        frames = F.pad(frames, (columns, columns, rows, rows, 0, 0), mode="reflect")
    return frames, left

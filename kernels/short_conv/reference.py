"""Short depthwise convolution over frames, made symmetric: the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """A causal kernel run forwards and backwards, its centre counted once (SANA-WM, `k_conv_only`).

    x (B, T, S, C); weight (C, 1, K), the last tap is the present frame; before (B, K - 1, S, C), the frames before x.
    Other frames outside the clip are zero. Same shape and dtype as x. y_t = w_{K-1} x_t + sum_j w_{K-1-j} (x_{t-j} +
    x_{t+j}).
    """
    taps = weight[:, 0].to(x.dtype).unbind(1)
    reach, frames = len(taps) - 1, x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, reach, reach))
    if before is not None:
        padded[:, :reach] = before
    y = x * taps[-1]
    for j in range(1, reach + 1):
        y = y + taps[-1 - j] * (padded[:, reach - j : reach - j + frames] + padded[:, reach + j : reach + j + frames])
    return y

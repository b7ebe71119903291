"""GLU-MBConv feed-forward with a residual temporal convolution (SANA-WM section 1.11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.model.dit.time_axis import TimeAxis

_MAX_ELEMENTS = 1 << 30  # convolutions index with 32 bits


class _Conv(nn.Module):
    """A convolution under the name `conv`, as checkpoints have it."""

    def __init__(self, *args: int, **kwargs: int | bool):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GLUMBConvTemp(nn.Module):
    """Point-wise expansion, 3 x 3 depthwise, gate, point-wise reduction y; returns y + temporal convolution of y."""

    def __init__(self, size: int, inner: int, temporal_kernel_size: int):
        super().__init__()
        self.inverted_conv = _Conv(size, 2 * inner, 1)
        self.depth_conv = _Conv(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.point_conv = _Conv(inner, size, 1, bias=False)
        self.t_conv = nn.Conv2d(
            size, size, (temporal_kernel_size, 1), padding=(temporal_kernel_size // 2, 0), bias=False
        )
        nn.init.zeros_(self.t_conv.weight)

    def forward(self, x: Tensor, grid: tuple[int, int, int], time: TimeAxis) -> Tensor:
        """x (B, N, C) of a (T, height, width) grid."""
        frames, height, width = grid
        batch, _, size = x.shape
        images = x.reshape(batch * frames, height, width, size).permute(0, 3, 1, 2)
        rows = max(1, _MAX_ELEMENTS // (self.inverted_conv.conv.out_channels * height * width))
        y = (
            torch.cat([self._spatial(part) for part in images.split(rows)])
            if len(images) > rows
            else self._spatial(images)
        )
        y = y.view(batch, frames, size, height * width).transpose(1, 2)
        y = y + time.around(y, self.t_conv.kernel_size[0] // 2, self.t_conv, dim=2)
        return y.permute(0, 2, 3, 1).reshape(x.shape)

    def _spatial(self, images: Tensor) -> Tensor:
        value, gate = self.depth_conv(F.silu(self.inverted_conv(images))).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate)).contiguous()

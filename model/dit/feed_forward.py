"""GLU-MBConv feed-forward with a residual temporal convolution (SANA-WM section 1.11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.glu_conv import glu_conv
from longtake.model.dit.time_axis import TimeAxis
from longtake.model.float8 import Float8Linear

T_CONV = "t_conv"  # what a time axis knows the temporal convolution by


class _Conv(nn.Module):
    """A convolution under the name `conv`, as checkpoints have it."""

    def __init__(self, *args: int, **kwargs: int | bool):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def product(self, x: Tensor) -> Tensor:
        """Of a 1 x 1 convolution and x (..., C), channels last: as the matrix product that it is, many times faster."""
        conv: nn.Module = self.conv
        return conv(x) if isinstance(conv, Float8Linear) else F.linear(x, conv.weight.flatten(1), conv.bias)


class GLUMBConvTemp(nn.Module):
    """Point-wise expansion, 3 x 3 depthwise, gate, point-wise reduction y; and a temporal convolution of y."""

    def __init__(self, size: int, inner: int, temporal_kernel_size: int):
        super().__init__()
        self.inverted_conv = _Conv(size, 2 * inner, 1)
        self.depth_conv = _Conv(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.point_conv = _Conv(inner, size, 1, bias=False)
        self.t_conv = nn.Conv2d(
            size, size, (temporal_kernel_size, 1), padding=(temporal_kernel_size // 2, 0), bias=False
        )
        nn.init.zeros_(self.t_conv.weight)

    def lay_out(self) -> None:
        """Put weights that will not be trained where they are read fastest."""
        self.t_conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        taps = self.depth_conv.conv.weight
        taps.data = taps.data.flatten(1).T.contiguous().T.view(taps.shape)

    def forward(self, x: Tensor, grid: tuple[int, int, int], time: TimeAxis) -> tuple[Tensor, Tensor]:
        """x (B, N, C) of a (T, height, width) grid: y and its convolution, which the block adds up."""
        frames, height, width = grid
        depthwise = self.depth_conv.conv
        assert depthwise.bias is not None
        y = self.inverted_conv.product(x).unflatten(1, (-1, height, width)).flatten(0, 1)
        y = self.point_conv.product(glu_conv(y, depthwise.weight, depthwise.bias))
        y = y.view(len(x), frames, height * width, -1)
        around = time.around(y, self.t_conv.kernel_size[0] // 2, self._over_time, part=T_CONV)
        return y.flatten(1, 2), around.flatten(1, 2)

    def of_past(self, before: Tensor) -> Tensor:
        """What the frames before (B, reach, S, C) add to the convolution's result of as many after them."""
        taps, reach = self.t_conv.weight[..., 0].to(before.dtype).unbind(2), before.shape[1]
        added = F.linear(before, taps[0])
        for nearer in range(1, reach):  # of each frame, to the results that many frames earlier
            added[:, : reach - nearer] += F.linear(before[:, nearer:], taps[nearer])
        return added

    def _over_time(self, y: Tensor, first: int, before: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Of y (B, T, S, C), without a copy of it unless others are before; added: what these make of it."""
        reach = self.t_conv.kernel_size[0] // 2
        if added is not None:
            first = 0
        elif before is not None:
            y, first = torch.cat([before, y], 1), first + before.shape[1]
        if added is None and (first < reach or torch.is_grad_enabled()):
            return self.t_conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, first:]
        # Of few frames, a product for each tap is faster, and none is computed that is not asked for.
        taps, frames = self.t_conv.weight[..., 0].to(y.dtype).unbind(2), y.shape[1] - first
        out = F.linear(y[:, first:], taps[reach])
        if added is not None:
            out[:, : added.shape[1]] += added[:, :frames]
        for shift in (*range(-reach, 0), *range(1, reach + 1)):
            begin, end = max(0, -shift - first), min(frames, frames - shift)  # results that this tap adds to
            if begin < end:
                others = y[:, first + shift + begin : first + shift + end].flatten(1, 2)
                out[:, begin:end].flatten(1, 2).baddbmm_(others, taps[reach + shift].T.expand(len(y), -1, -1))
        return out

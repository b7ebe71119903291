"""`conv_input` in Triton, channels last. A program makes some positions of a frame, with all of their channels.

Those of the border norm what they mirror anew: a reduction over channels that are in registers anyway, where a second
pass would read everything again. Inputs may lie in any order; channels last is the fast one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS, _WARPS = 4096, 4  # of a tile, unless one position has more channels


@triton.jit
def _mirrored(place, size):
    """Where a border's place lies within 0 ... size - 1."""
    return size - 1 - tl.abs(size - 1 - tl.abs(place))


@triton.jit
def _new(ptr, at, inside, eps, C: tl.constexpr):
    """The positions of a tile (rows, channels), normed unless eps is None; float32."""
    x = tl.load(ptr + at, inside, 0.0).to(tl.float32)
    if eps is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        x *= tl.sigmoid(x)
    return x


@triton.jit
def _conv_input(
    x_ptr, past_ptr, out_ptr, left_ptr, x_clip, x_channel, x_frame, x_row, x_column, past_clip, past_channel,
    past_frame, past_row, past_column, frames, height, width, eps, C: tl.constexpr, REACH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`frames` are those of the output, which is contiguous channels last, as what is left; ROWS and COLUMNS are the
    border's.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(1).to(tl.int64)
    clip, t = number // frames, number % frames
    across = width + 2 * COLUMNS
    positions = (height + 2 * ROWS) * across
    row, column = at // across - ROWS, at % across - COLUMNS
    h = _mirrored(row, height).to(tl.int64)[:, None]
    w = _mirrored(column, width).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (at < positions)[:, None] & (c < C)
    here = x_ptr + clip * x_clip + tl.maximum(t - REACH, 0) * x_frame
    x_at = h * x_row + w * x_column + c.to(tl.int64) * x_channel
    if past_ptr is None:
        value = _new(here, x_at, inside, eps, C)
    else:
        if t < REACH:
            past_at = h * past_row + w * past_column + c.to(tl.int64) * past_channel
            value = tl.load(past_ptr + clip * past_clip + t * past_frame + past_at, inside, 0.0).to(tl.float32)
        else:
            value = _new(here, x_at, inside, eps, C)
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + number * positions * C + at.to(tl.int64)[:, None] * C + c, value, inside)
    if t >= frames - REACH:
        last = clip * REACH + t - (frames - REACH)
        within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        to = (row * width + column).to(tl.int64)[:, None] * C + c
        tl.store(left_ptr + last * height * width * C + to, value, inside & within[:, None])


def conv_input(
    x: Tensor, past: Tensor | None, reach: int, border: tuple[int, int], eps: float | None
) -> tuple[Tensor, Tensor]:
    """As the definition, without a gradient."""
    (b, c, t, h, w), (rows, columns) = x.shape, border
    frames, positions = reach + t, (h + 2 * rows) * (w + 2 * columns)
    out, left = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        for shape in ((b, c, frames, h + 2 * rows, w + 2 * columns), (b, c, reach, h, w))
    )
    block_c = triton.next_power_of_2(c)
    block = max(1, _ELEMENTS // block_c)
    _conv_input[triton.cdiv(positions, block), b * frames](
        x, past, out, left, *x.stride(), *(x if past is None else past).stride(), frames, h, w, eps, c, reach, rows,
        columns, block, block_c, num_warps=_WARPS,
    )  # fmt: skip
    return out, left

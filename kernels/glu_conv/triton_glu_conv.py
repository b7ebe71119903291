"""`glu_conv` in Triton, channels last: x is read once from memory, and the output written once.

A program walks down some columns of a frame, for a block of channels. A row is loaded at its three offsets, goes
through SiLU there, and adds to the sums of the three rows that it touches; so SiLU is computed 3 times and not 9.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _CHANNELS = 8, 128
_PROGRAMS = 64  # a block of channels, that share the frames of a weight's gradient


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _taps(weight_ptr, c, row: tl.constexpr, column: tl.constexpr, inside):
    return tl.load(weight_ptr + c * 9 + 3 * row + column, inside, 0.0).to(tl.float32)[None, :]


@triton.jit
def _row(x_ptr, weight_ptr, c, inside_c, at, x, height, width, y, above, here, below, C2: tl.constexpr):
    """Add row y, through SiLU, to the sums of the rows above, here and below."""
    for dx in tl.static_range(3):
        column = x + dx - 1
        inside = (column >= 0) & (column < width) & (y < height)
        value = tl.load(x_ptr + (at + y * width + column)[:, None] * C2 + c[None, :], inside[:, None] & inside_c, 0.0)
        value = _silu(value.to(tl.float32))
        above += value * _taps(weight_ptr, c, 2, dx, inside_c)
        here += value * _taps(weight_ptr, c, 1, dx, inside_c)
        below += value * _taps(weight_ptr, c, 0, dx, inside_c)
    return above, here, below


@triton.jit
def _sums(
    x_ptr, weight_ptr, bias_ptr, grad_ptr, out_ptr, height, width, INNER: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forwards: out (frames, height, width, I). Backwards, from the output's gradient: that of the convolution's
    result, (frames, height, width, 2 I).
    """
    at = tl.program_id(0).to(tl.int64) * height * width
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < INNER
    empty = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    bias_v = tl.load(bias_ptr + c, inside_c, 0.0).to(tl.float32)[None, :]
    bias_g = tl.load(bias_ptr + INNER + c, inside_c, 0.0).to(tl.float32)[None, :]
    gate_x, gate_w = x_ptr + INNER, weight_ptr + 9 * INNER
    wide: tl.constexpr = 2 * INNER
    _, above_v, here_v = _row(x_ptr, weight_ptr, c, inside_c, at, x, height, width, 0, empty, empty, empty, wide)
    _, above_g, here_g = _row(gate_x, gate_w, c, inside_c, at, x, height, width, 0, empty, empty, empty, wide)
    for y in range(1, height + 1):  # row y completes the sums of the row above it
        value, above_v, here_v = _row(
            x_ptr, weight_ptr, c, inside_c, at, x, height, width, y, above_v, here_v, empty, wide
        )
        gate, above_g, here_g = _row(gate_x, gate_w, c, inside_c, at, x, height, width, y, above_g, here_g, empty, wide)
        value, gate = value + bias_v, gate + bias_g
        position = (at + (y - 1) * width + x)[:, None]
        inside = (x < width)[:, None] & inside_c[None, :]
        if BACKWARD:
            grad = tl.load(grad_ptr + position * INNER + c[None, :], inside, 0.0).to(tl.float32)
            opened = tl.sigmoid(gate)
            to_gate = grad * value * opened * (1 + gate * (1 - opened))
            to = out_ptr + position * 2 * INNER + c[None, :]
            tl.store(to, (grad * gate * opened).to(out_ptr.dtype.element_ty), inside)
            tl.store(to + INNER, to_gate.to(out_ptr.dtype.element_ty), inside)
        else:
            out = (value * _silu(gate)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + position * INNER + c[None, :], out, inside)


@triton.jit
def _spread(
    x_ptr, weight_ptr, grad_ptr, dx_ptr, parts_ptr, frames, height, width, C2: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's result: that of x, and this program's part (10, 2 I) of the weight's and
    the bias's. A position q meets the results q - o at the nine offsets o, for both.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C2
    tap = tl.arange(0, 16)[:, None]
    parts = tl.zeros([16, BLOCK_C], tl.float32)  # by tap; the tenth is the bias's
    strips = tl.cdiv(width, BLOCK_X)
    for number in range(tl.program_id(0), frames * height * strips, tl.num_programs(0)):
        y, strip = number // strips % height, number % strips
        at = tl.cast(number // strips // height, tl.int64) * height * width
        x = strip * BLOCK_X + tl.arange(0, BLOCK_X)
        here = (at + y * width + x)[:, None] * C2 + c[None, :]
        inside = (x < width)[:, None] & inside_c[None, :]
        value = tl.load(x_ptr + here, inside, 0.0).to(tl.float32)
        opened = tl.sigmoid(value)
        total = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
        for dy in tl.static_range(3):
            for dx in tl.static_range(3):
                row, column = y - (dy - 1), x - (dx - 1)
                known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                grad = tl.load(grad_ptr + (at + row * width + column)[:, None] * C2 + c[None, :],
                               known[:, None] & inside_c[None, :], 0.0).to(tl.float32)  # fmt: skip
                total += grad * _taps(weight_ptr, c, dy, dx, inside_c)
                part = tl.sum(tl.where(inside, grad * value * opened, 0.0), 0)
                parts += tl.where(tap == 3 * dy + dx, part[None, :], 0.0)
                if dy == 1 and dx == 1:
                    parts += tl.where(tap == 9, tl.sum(grad, 0)[None, :], 0.0)
        total *= opened * (1 + value * (1 - opened))
        tl.store(dx_ptr + here, total.to(dx_ptr.dtype.element_ty), inside)
    to = parts_ptr + (tl.program_id(0) * 10 + tap) * C2 + c[None, :]
    tl.store(to, parts, (tap < 10) & inside_c[None, :])


class GLUConv(torch.autograd.Function):
    """As the definition; x, weight and bias of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        frames, height, width, channels = x.shape
        out = x.new_empty(frames, height, width, channels // 2)
        _sums[_grid(x)](x, weight, bias, x, out, height, width, channels // 2, _COLUMNS, _CHANNELS, False)
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        frames, height, width, channels = x.shape
        results, dx = torch.empty_like(x), torch.empty_like(x)
        _sums[_grid(x)](
            x, weight, bias, grad.contiguous(), results, height, width, channels // 2, _COLUMNS, _CHANNELS, True
        )
        programs = min(_PROGRAMS, frames * height)
        parts = torch.empty(programs, 10, channels, device=x.device)
        _spread[programs, triton.cdiv(channels, _CHANNELS)](
            x, weight, results, dx, parts, frames, height, width, channels, _COLUMNS, _CHANNELS
        )
        sums = parts.sum(0)
        return dx, sums[:9].T.reshape(weight.shape).to(weight.dtype), sums[9].to(bias.dtype)


def _grid(x: Tensor) -> tuple[int, int, int]:
    frames, _, width, channels = x.shape
    return frames, triton.cdiv(width, _COLUMNS), triton.cdiv(channels // 2, _CHANNELS)

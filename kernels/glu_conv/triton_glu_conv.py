"""`glu_conv` in Triton, channels last. A program walks down a strip of columns, for a block of channels.

Each row passes through registers once: SiLU is computed once for every column of the strip and its two neighbours, and
adds to the sums of the three rows around it. The columns of a row are a tuple, so a shift by a column costs nothing;
the next row is on its way from memory while this one is summed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_COLUMNS, _CHANNELS, _WARPS = 4, 64, 1  # of `_sums`; the columns and channels of a thread are bound by its registers
_SPREAD_COLUMNS, _SPREAD_CHANNELS, _SPREAD_WARPS = 4, 64, 1
_PROGRAMS = 20  # a block of channels, that share the strips of a weight's gradient


@triton.jit
def _silu(x, FAST: tl.constexpr):
    """(sigmoid, SiLU) of x. FAST: both from one instruction, tanh, of relative error 2^-11."""
    if FAST:
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, is_pure=True, pack=1)
        return 0.5 + 0.5 * tanh, half + half * tanh
    else:
        sigmoid = tl.sigmoid(x)
        return sigmoid, x * sigmoid


@triton.jit
def _taps(weight_ptr, inside, CHANNELS: tl.constexpr):
    taps = ()
    for k in tl.static_range(9):
        taps += (tl.load(weight_ptr + k * CHANNELS, inside, 0.0).to(tl.float32),)
    return taps


@triton.jit
def _row(
    ptr, inside, frame, y, column, height, width, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns `column` ... of row y of a frame that starts at position `frame`; zeros outside the frame."""
    row = ()
    ptr += (frame + y * width + column) * CHANNELS
    for i in tl.static_range(COLUMNS):
        known = (y < height) & (column + i >= 0) & (column + i < width) & inside
        row += (tl.load(ptr + i * CHANNELS, known, 0.0),)
    return row


@triton.jit
def _floats(row):
    values = ()
    for i in tl.static_range(len(row)):
        values += (row[i].to(tl.float32),)
    return values


@triton.jit
def _silus(row, FAST: tl.constexpr):
    values = ()
    for i in tl.static_range(len(row)):
        values += (_silu(row[i].to(tl.float32), FAST)[1],)
    return values


@triton.jit
def _add(sums, values, taps, row: tl.constexpr):
    """`sums` and what the kernel's row adds to them: three taps with the columns left, here and right."""
    totals = ()
    for i in tl.static_range(len(sums)):
        total = sums[i] + values[i] * taps[3 * row]
        totals += (total + values[i + 1] * taps[3 * row + 1] + values[i + 2] * taps[3 * row + 2],)
    return totals


@triton.jit
def _sums(
    x_ptr, weight_ptr, bias_ptr, grad_ptr, out_ptr, height, width, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Forwards: out (frames, height, width, I). Backwards, from the output's gradient: that of the convolution's
    result, (frames, height, width, 2 I).
    """
    wide: tl.constexpr = 2 * INNER
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < INNER
    column = tl.program_id(1) * COLUMNS
    frame = tl.program_id(2).to(tl.int64) * height * width
    taps, gate_taps = _taps(weight_ptr + c, inside, wide), _taps(weight_ptr + INNER + c, inside, wide)
    bias = (tl.load(bias_ptr + c, inside, 0.0).to(tl.float32),) * COLUMNS
    gate_bias = (tl.load(bias_ptr + INNER + c, inside, 0.0).to(tl.float32),) * COLUMNS
    above, here, gate_above, gate_here = bias, bias, gate_bias, gate_bias
    x_ptr += c
    row = _row(x_ptr, inside, frame, 0, column - 1, height, width, wide, COLUMNS + 2)
    gate_row = _row(x_ptr + INNER, inside, frame, 0, column - 1, height, width, wide, COLUMNS + 2)
    for y in range(height + 1):  # row y completes the sums of the row above it
        values, gates = _silus(row, FAST), _silus(gate_row, FAST)
        row = _row(x_ptr, inside, frame, y + 1, column - 1, height, width, wide, COLUMNS + 2)
        gate_row = _row(x_ptr + INNER, inside, frame, y + 1, column - 1, height, width, wide, COLUMNS + 2)
        if BACKWARD:
            grads = _row(grad_ptr + c, (y > 0) & inside, frame, y - 1, column, height, width, INNER, COLUMNS)
        done, gate_done = _add(above, values, taps, 2), _add(gate_above, gates, gate_taps, 2)
        above, gate_above = _add(here, values, taps, 1), _add(gate_here, gates, gate_taps, 1)
        here, gate_here = _add(bias, values, taps, 0), _add(gate_bias, gates, gate_taps, 0)
        for i in tl.static_range(COLUMNS):
            position = frame + (y - 1) * width + column + i
            known = (y > 0) & (column + i < width) & inside
            opened, silu = _silu(gate_done[i], FAST)
            if BACKWARD:
                grad = grads[i].to(tl.float32)
                to_gate = grad * done[i] * (opened + silu * (1 - opened))
                to = out_ptr + position * wide + c
                tl.store(to, (grad * silu).to(out_ptr.dtype.element_ty), known)
                tl.store(to + INNER, to_gate.to(out_ptr.dtype.element_ty), known)
            else:
                tl.store(out_ptr + position * INNER + c, (done[i] * silu).to(out_ptr.dtype.element_ty), known)


@triton.jit
def _spread(
    x_ptr, weight_ptr, grad_ptr, dx_ptr, parts_ptr, frames, height, width, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's result: that of x, and this program's part (10, 2 I) of the weight's and
    the bias's. A position q meets the results q - o at the nine offsets o, for both.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < CHANNELS
    taps = _taps(weight_ptr + c, inside, CHANNELS)
    zero = tl.zeros([BLOCK_C], tl.float32)
    parts = (zero,) * 10  # by tap; the tenth is the bias's
    x_ptr += c
    grad_ptr += c
    strips = tl.cdiv(width, COLUMNS)
    for number in range(tl.program_id(1), frames * strips, tl.num_programs(1)):
        column = number % strips * COLUMNS
        frame = tl.cast(number // strips, tl.int64) * height * width
        above = (zero,) * (COLUMNS + 2)
        here = _floats(_row(grad_ptr, inside, frame, 0, column - 1, height, width, CHANNELS, COLUMNS + 2))
        row = _row(grad_ptr, inside, frame, 1, column - 1, height, width, CHANNELS, COLUMNS + 2)
        x_row = _row(x_ptr, inside, frame, 0, column, height, width, CHANNELS, COLUMNS)
        for y in range(height):
            below, x = _floats(row), _floats(x_row)
            row = _row(grad_ptr, inside, frame, y + 2, column - 1, height, width, CHANNELS, COLUMNS + 2)
            x_row = _row(x_ptr, inside, frame, y + 1, column, height, width, CHANNELS, COLUMNS)
            for i in tl.static_range(COLUMNS):
                around = above[i : i + 3] + here[i : i + 3] + below[i : i + 3]  # the last tap's result first
                opened, silu = _silu(x[i], FAST)
                total, grown = zero, ()
                for k in tl.static_range(9):
                    total += around[8 - k] * taps[k]
                    grown += (parts[k] + around[8 - k] * silu,)
                parts = grown + (parts[9] + around[4],)
                to = dx_ptr + (frame + y * width + column + i) * CHANNELS + c
                dx = total * (opened + silu * (1 - opened))
                tl.store(to, dx.to(dx_ptr.dtype.element_ty), (column + i < width) & inside)
            above, here = here, below
    for k in tl.static_range(10):
        tl.store(parts_ptr + (tl.program_id(1) * 10 + k) * CHANNELS + c, parts[k], inside)


class GLUConv(torch.autograd.Function):
    """As the definition; x, weight and bias of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, taps, bias = x.contiguous(), weight.flatten(1).T.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, taps, bias)
        return _launch_sums(x, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, taps, bias = ctx.saved_tensors
        frames, height, width, channels = x.shape
        results, dx = _launch_sums(x, taps, bias, grad.contiguous()), torch.empty_like(x)
        programs = min(_PROGRAMS, frames * triton.cdiv(width, _SPREAD_COLUMNS))
        parts = torch.empty(programs, 10, channels, device=x.device)
        _spread[triton.cdiv(channels, _SPREAD_CHANNELS), programs](
            x, taps, results, dx, parts, frames, height, width, channels, _SPREAD_COLUMNS, _SPREAD_CHANNELS, _fast(x),
            num_warps=_SPREAD_WARPS,
        )  # fmt: skip
        sums = parts.sum(0)
        return dx, sums[:9].T.reshape(channels, 1, 3, 3).to(taps.dtype), sums[9].to(bias.dtype)


def _launch_sums(x: Tensor, taps: Tensor, bias: Tensor, grad: Tensor | None = None) -> Tensor:
    """The output; or, given its gradient, that of the convolution's result."""
    frames, height, width, channels = x.shape
    inner = channels // 2
    out = x.new_empty(frames, height, width, inner if grad is None else channels)
    _sums[triton.cdiv(inner, _CHANNELS), triton.cdiv(width, _COLUMNS), frames](
        x, taps, bias, x if grad is None else grad, out, height, width, inner, _COLUMNS, _CHANNELS, grad is not None,
        _fast(x), num_warps=_WARPS,
    )  # fmt: skip
    return out


def _fast(x: Tensor) -> bool:
    """Whether an approximate tanh will do: 16 bits hide it. Triton's interpreter, on a CPU, has none."""
    return x.is_cuda and x.element_size() == 2

"""`gated` and `output_gate` in Triton: flat tiles, that read everything once and write it once.

A tile of `gated` lies within a frame, so that it meets one row of the gate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import even_rows
from longtake.kernels.modulate.triton_modulate import frame_rows, load, store

_ROWS, _CHANNELS = 16, 256  # a tile of `gated`
_TILES = 4  # of a program of its backward pass
_ELEMENTS = 2048  # of a program of `output_gate`


@triton.jit
def _gated(
    x_ptr, gate_ptr, y_ptr, more_ptr, plus_ptr, out_ptr, tokens, gate_row, C: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, frame = tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    start, at = (frame * tokens + first) * C, rows * C + c[None, :]
    inside = (first + rows < tokens) & (c < C)[None, :]
    y, out = load(y_ptr + start, at, inside), load(x_ptr + start, at, inside)
    if more_ptr is not None:
        y += load(more_ptr + start, at, inside)
    out += load(gate_ptr + frame * gate_row, c, c < C)[None, :] * y
    if plus_ptr is not None:
        out += load(plus_ptr + start, at, inside)
    store(out_ptr + start, at, out, inside)


@triton.jit
def _gated_backward(
    grad_ptr, gate_ptr, y_ptr, more_ptr, dy_ptr, sums_ptr, tokens, gate_row, C: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dy, and the gate's gradient (C) of this program's tokens; either pointer may be None."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, frame = tl.program_id(1) * TILES * ROWS, tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    gate = load(gate_ptr + frame * gate_row, c, c < C)[None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for number in range(first, tl.minimum(first + TILES * ROWS, tokens), ROWS):
        start, at = (frame * tokens + number) * C, rows * C + c[None, :]
        inside = (number + rows < tokens) & (c < C)[None, :]
        grad = load(grad_ptr + start, at, inside)
        if sums_ptr is not None:
            y = load(y_ptr + start, at, inside)
            if more_ptr is not None:
                y += load(more_ptr + start, at, inside)
            total += grad * y
        if dy_ptr is not None:
            store(dy_ptr + start, at, gate * grad, inside)
    if sums_ptr is not None:
        to = (frame * tl.num_programs(1) + tl.program_id(1)) * C
        tl.store(sums_ptr + to + c, tl.sum(total, 0), c < C)


@triton.jit
def _output_gate(out_ptr, gate_ptr, camera_ptr, to_ptr, elements, gate_row, C: tl.constexpr, BLOCK: tl.constexpr):
    start, at = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = start + at < elements
    gate_at = (start + at) // C * gate_row + (start + at) % C
    out, gate = load(out_ptr + start, at, inside), load(gate_ptr, gate_at, inside)
    if camera_ptr is not None:
        out += load(camera_ptr + start, at, inside)
    store(to_ptr + start, at, out * gate * tl.sigmoid(gate), inside)


@triton.jit
def _output_gate_backward(
    out_ptr, gate_ptr, camera_ptr, grad_ptr, d_out_ptr, d_gate_ptr, elements, BLOCK: tl.constexpr
):
    start, at = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = start + at < elements
    out, gate = load(out_ptr + start, at, inside), load(gate_ptr + start, at, inside)
    if camera_ptr is not None:
        out += load(camera_ptr + start, at, inside)
    grad, opened = load(grad_ptr + start, at, inside), tl.sigmoid(gate)
    store(d_out_ptr + start, at, grad * gate * opened, inside)
    store(d_gate_ptr + start, at, grad * out * opened * (1 + gate * (1 - opened)), inside)


class Gated(torch.autograd.Function):
    """As the definition; each gradient in its input's dtype. y and more_y are kept only for the gate's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, more_y: Tensor | None, plus: Tensor | None) -> Tensor:
        ctx.shape, ctx.dtypes = gate.shape, tuple(None if t is None else t.dtype for t in (x, gate, y, more_y, plus))
        x, y, more_y, plus = (None if t is None else t.contiguous() for t in (x, y, more_y, plus))
        rows, tokens = frame_rows(gate), x.shape[1] // gate.shape[1]
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, gate.dtype))
        grid, sizes = _tiles(x, tokens, len(rows), _ROWS)
        _gated[grid](x, rows, y, more_y, plus, out, tokens, rows.stride(0), *sizes)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows, y, more_y)
        else:
            ctx.save_for_backward(rows, None, None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gate, y, more_y = ctx.saved_tensors
        x_dtype, gate_dtype, y_dtype, more_dtype, plus_dtype = ctx.dtypes
        grad, tokens, (_, to_gate, *to_y, _) = grad.contiguous(), grad.shape[1] // ctx.shape[1], ctx.needs_input_grad
        grid, sizes = _tiles(grad, tokens, len(gate), _TILES * _ROWS)
        dy = torch.empty_like(grad, dtype=y_dtype) if any(to_y) else None
        sums = torch.empty(len(gate), grid[1], grad.shape[2], device=grad.device) if to_gate else None
        _gated_backward[grid](grad, gate, y, more_y, dy, sums, tokens, gate.stride(0), *sizes, _TILES)
        d_gate = None if sums is None else sums.sum(1).view(ctx.shape).to(gate_dtype)
        d_more = None if dy is None or more_dtype is None else dy.to(more_dtype)
        return grad.to(x_dtype), d_gate, dy, d_more, None if plus_dtype is None else grad.to(plus_dtype)


class OutputGate(torch.autograd.Function):
    """As the definition; each gradient in its input's dtype."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gate: Tensor, camera: Tensor | None) -> Tensor:
        gate = gate.contiguous() if any(ctx.needs_input_grad) else even_rows(gate)
        out, camera = (None if t is None else t.contiguous() for t in (out, camera))
        gated = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _output_gate[triton.cdiv(gate.numel(), _ELEMENTS),](
            out, gate, camera, gated, gate.numel(), gate.stride(1), gate.shape[2], _ELEMENTS
        )  # fmt: skip
        ctx.save_for_backward(out, gate, camera)
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        out, gate, camera = ctx.saved_tensors
        d_out, d_gate = torch.empty_like(out), torch.empty_like(gate)
        _output_gate_backward[triton.cdiv(gate.numel(), _ELEMENTS),](
            out, gate, camera, grad.contiguous(), d_out, d_gate, gate.numel(), _ELEMENTS
        )
        return d_out, d_gate, None if camera is None else d_out.to(camera.dtype)


def _tiles(x: Tensor, tokens: int, frames: int, stretch: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The grid of programs of a stretch of tokens each, neighbours in memory first; C and the size of a tile."""
    channels = min(_CHANNELS, triton.next_power_of_2(x.shape[2]))
    grid = triton.cdiv(x.shape[2], channels), triton.cdiv(tokens, stretch), frames
    return grid, (x.shape[2], _ROWS, channels)

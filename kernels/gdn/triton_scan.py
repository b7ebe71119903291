"""The serial part in Triton: a program carries some rows of the state of one head through all frames.

Rows of the state are independent, so a head is cut into blocks of rows; both directions run at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import padded, roomy

_ROWS, _WARPS = 32, 8
# Products of the state are float32's to some 20 bits: what rounding loses, every frame loses again.
_PRECISION = "tf32x3"


@triton.jit
def _carry(
    transition_ptr, increment_ptr, state, out_ptr, first, head, heads, frames, r, d, ROWS: tl.constexpr,
    D: tl.constexpr, REVERSED: tl.constexpr, TRANSPOSED: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Move `state` through the frames. Of every frame is stored, by READ: the state "after" its map; "before" it; or
    the state after its increment was "added" and before its transition.
    """
    square = (d < D)[:, None] & (d < D)[None, :]
    here = (r < ROWS)[:, None] & (d < D)[None, :]
    for step in range(frames):
        t = frames - 1 - step if REVERSED else step
        at = (first + t) * heads + head
        if TRANSPOSED:
            a = tl.load(transition_ptr + at * D * D + d[None, :] * D + d[:, None], square, 0.0)
        else:
            a = tl.load(transition_ptr + at * D * D + d[:, None] * D + d[None, :], square, 0.0)
        u = tl.load(increment_ptr + at * ROWS * D + r[:, None] * D + d[None, :], here, 0.0)
        to = out_ptr + at * ROWS * D + r[:, None] * D + d[None, :]
        if READ == "added":
            state += u
            tl.store(to, state, here)
            state = tl.dot(state, a, input_precision=PRECISION)
        else:
            if READ == "before":
                tl.store(to, state, here)
            state = tl.dot(state, a, u, input_precision=PRECISION)
            if READ == "after":
                tl.store(to, state, here)
    return state


@triton.jit
def _one_way(
    transition_ptr, increment_ptr, start_ptr, out_ptr, end_ptr, frames, heads, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, REVERSED: tl.constexpr, TRANSPOSED: tl.constexpr,
    READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    clip, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    here = (r < ROWS)[:, None] & (d < D)[None, :]
    edge = (clip * heads + head) * ROWS * D + r[:, None] * D + d[None, :]
    state = tl.load(start_ptr + edge, here, 0.0)
    state = _carry(transition_ptr, increment_ptr, state, out_ptr, clip * frames, head, heads, frames, r, d, ROWS, D,
                   REVERSED, TRANSPOSED, READ, PRECISION)  # fmt: skip
    tl.store(end_ptr + edge, state, here)


@triton.jit
def _both_ways(
    transition_ptr, increment_ptr, forward_ptr, backward_ptr, frames, heads, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States: forwards after each frame, backwards before it. GRADIENT: what those states' gradients are to the
    increments, each in its scan's opposite direction.
    """
    clip, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    state = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = clip * frames
    if tl.program_id(2) == 0:
        _carry(transition_ptr, increment_ptr, state, forward_ptr, first, head, heads, frames, r, d, ROWS, D,
               GRADIENT, GRADIENT, "added" if GRADIENT else "after", PRECISION)  # fmt: skip
    else:
        _carry(transition_ptr, increment_ptr, state, backward_ptr, first, head, heads, frames, r, d, ROWS, D,
               not GRADIENT, GRADIENT, "before", PRECISION)  # fmt: skip


@triton.jit
def _to_maps(
    forwards_ptr, backwards_ptr, to_forwards_ptr, to_backwards_ptr, d_transition_ptr, d_increment_ptr, frames, heads,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the two scans' gradients to a frame's. Its transition moved the state before it: of the frames before, and
    of the frames after.
    """
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = frame * heads + head
    earlier = (frame % frames > 0) & (r < BLOCK_R)
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for first in range(0, ROWS, BLOCK_R):
        inside = (first + r < ROWS)[:, None] & (d < D)[None, :]
        here = at * ROWS * D + (first + r)[:, None] * D + d[None, :]
        to_forwards = tl.load(to_forwards_ptr + here, inside, 0.0)
        to_backwards = tl.load(to_backwards_ptr + here, inside, 0.0)
        tl.store(d_increment_ptr + here, to_forwards + to_backwards, inside)
        before = tl.load(forwards_ptr + here - heads * ROWS * D, inside & earlier[:, None], 0.0)
        total = tl.dot(tl.trans(before), to_forwards, total, input_precision=PRECISION)
        after = tl.load(backwards_ptr + here, inside, 0.0)
        total = tl.dot(tl.trans(after), to_backwards, total, input_precision=PRECISION)
    square = (d < D)[:, None] & (d < D)[None, :]
    tl.store(d_transition_ptr + at * D * D + d[:, None] * D + d[None, :], total, square)


class ScanStates(torch.autograd.Function):
    """transition (B, T, H, D, D), increment (B, T, H, V, D) and state (B, H, V, D), float32: the state after each frame
    and the last one."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, increment: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        transition, increment, state = transition.contiguous(), increment.contiguous(), state.float().contiguous()
        states, end = torch.empty_like(increment), torch.empty_like(state)
        _one_way[_grid(increment)](
            transition, increment, state, states, end, *_layout(increment), False, False, "after", _PRECISION,
            num_warps=_WARPS, num_stages=_stages(increment),
        )  # fmt: skip
        ctx.save_for_backward(transition, state, states)
        return states, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_end: Tensor) -> Any:  # type: ignore[override]
        transition, state, states = ctx.saved_tensors
        d_states = d_states.clone(memory_format=torch.contiguous_format)
        d_states[:, -1] += d_end
        d_increment, d_state = torch.empty_like(d_states), torch.empty_like(state)
        _one_way[_grid(d_states)](
            transition, d_states, torch.zeros_like(state), d_increment, d_state, *_layout(d_states), True, True,
            "added", _PRECISION, num_warps=_WARPS, num_stages=_stages(d_states),
        )  # fmt: skip
        before = torch.cat([state[:, None], states[:, :-1]], 1)
        return before.transpose(-1, -2) @ d_increment, d_increment, d_state


class BidirectionalStates(torch.autograd.Function):
    """Of transition (B, T, H, D, D) and increment (B, T, H, V, D), float32: the sum of the state after each frame,
    scanning forwards, and of what the later frames left, scanning backwards."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, increment: Tensor) -> Tensor:
        transition, increment = transition.contiguous(), increment.contiguous()
        forwards, backwards = torch.empty_like(increment), torch.empty_like(increment)
        _both_ways[*_grid(increment), 2](
            transition, increment, forwards, backwards, *_layout(increment), False, _PRECISION, num_warps=_WARPS,
            num_stages=_stages(increment),
        )  # fmt: skip
        ctx.save_for_backward(transition, forwards, backwards)
        return forwards + backwards

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> Any:  # type: ignore[override]
        transition, forwards, backwards = ctx.saved_tensors
        d_states = d_states.contiguous()
        to_forwards, to_backwards = torch.empty_like(d_states), torch.empty_like(d_states)
        _both_ways[*_grid(d_states), 2](
            transition, d_states, to_forwards, to_backwards, *_layout(d_states), True, _PRECISION, num_warps=_WARPS,
            num_stages=_stages(d_states),
        )  # fmt: skip
        d_transition, d_increment = torch.empty_like(transition), torch.empty_like(d_states)
        b, t, h = d_states.shape[:3]
        _to_maps[b * t, h](
            forwards, backwards, to_forwards, to_backwards, d_transition, d_increment, *_layout(d_states), _PRECISION,
            num_warps=8, num_stages=2,
        )  # fmt: skip
        return d_transition, d_increment


def _grid(increment: Tensor) -> tuple[int, int]:
    b, _, h, rows, _ = increment.shape
    return triton.cdiv(rows, _ROWS), b * h


def _stages(x: Tensor) -> int:
    """A stage is a frame's transition."""
    return 2 if roomy(x) else 1


def _layout(increment: Tensor) -> tuple:
    _, t, h, rows, d = increment.shape
    return t, h, rows, d, _ROWS, padded(d)

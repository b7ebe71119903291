"""The serial part in Triton: a program carries some rows of the state of one head through all frames.

Rows of the state are independent, so a head is cut into blocks of rows; both directions run at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import padded, roomy

_ROWS, _WARPS = 32, 8
_ROWS_SUMMED = 16
# Products of the state are float32's to some 20 bits: what rounding loses, every frame loses again.
_PRECISION = "tf32x3"


@triton.jit
def _carry(
    transition_ptr, increment_ptr, state, out_ptr, first, head, heads, frames, r, d, ROWS: tl.constexpr,
    ADDED: tl.constexpr, D: tl.constexpr, REVERSED: tl.constexpr, TRANSPOSED: tl.constexpr, READ: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Move `state` through the frames; of its ROWS the first ADDED get increments. If KEEP, of every frame is stored,
    by READ: the state "after" its map; "before" it; or the state after its increment was "added" and before its
    transition.
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
        u = tl.load(increment_ptr + at * ADDED * D + r[:, None] * D + d[None, :], here & (r < ADDED)[:, None], 0.0)
        to = out_ptr + at * ROWS * D + r[:, None] * D + d[None, :]
        if READ == "added":
            state += u
            if KEEP:
                tl.store(to, state, here)
            state = tl.dot(state, a, input_precision=PRECISION)
        else:
            if KEEP and READ == "before":
                tl.store(to, state, here)
            state = tl.dot(state, a, u, input_precision=PRECISION)
            if KEEP and READ == "after":
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
    state = _carry(transition_ptr, increment_ptr, state, out_ptr, clip * frames, head, heads, frames, r, d, ROWS, ROWS,
                   D, REVERSED, TRANSPOSED, READ, True, PRECISION)  # fmt: skip
    tl.store(end_ptr + edge, state, here)


@triton.jit
def _both_ways(
    transition_ptr, increment_ptr, start_ptr, forward_ptr, backward_ptr, end_ptr, clips, frames, heads,
    ROWS: tl.constexpr, ADDED: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ADJOINT: tl.constexpr, KEEP: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States: forwards after each frame, backwards before it; the third axis of the grid begins with direction FIRST,
    0 forwards, 1 backwards. ADJOINT: what those states' gradients are to the
    increments, each in its scan's opposite direction.
    """
    clip, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    here = (r < ROWS)[:, None] & (d < D)[None, :]
    edge = ((tl.program_id(2) * clips + clip) * heads + head) * ROWS * D + r[:, None] * D + d[None, :]
    state = tl.load(start_ptr + edge, here, 0.0)
    first = clip * frames
    if FIRST + tl.program_id(2) == 0:
        state = _carry(transition_ptr, increment_ptr, state, forward_ptr, first, head, heads, frames, r, d, ROWS, ADDED,
                       D, ADJOINT, ADJOINT, "added" if ADJOINT else "after", KEEP, PRECISION)  # fmt: skip
    else:
        state = _carry(transition_ptr, increment_ptr, state, backward_ptr, first, head, heads, frames, r, d, ROWS,
                       ADDED, D, not ADJOINT, ADJOINT, "before", KEEP, PRECISION)  # fmt: skip
    tl.store(end_ptr + edge, state, here)


@triton.jit
def _summed(
    transition_ptr, increment_ptr, start_ptr, out_ptr, programs, other_transition_ptr, other_increment_ptr,
    other_start_ptr, other_out_ptr, frames, heads, ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One scan by the first `programs`, and by those after them another, if there is one."""
    number = tl.program_id(0)
    if number < programs:
        _sum(transition_ptr, increment_ptr, start_ptr, out_ptr, number, frames, heads, ROWS, D, BLOCK_R, BLOCK_D,
             PRECISION)  # fmt: skip
    elif other_out_ptr is not None:
        _sum(other_transition_ptr, other_increment_ptr, other_start_ptr, other_out_ptr, number - programs, frames,
             heads, OTHER_ROWS, D, BLOCK_R, BLOCK_D, PRECISION)  # fmt: skip


@triton.jit
def _sum(
    transition_ptr, increment_ptr, start_ptr, out_ptr, number, frames, heads, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every frame the state forwards after it and backwards before it, which is nothing for the last one."""
    blocks: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    clip, head = (number // blocks // heads).to(tl.int64), number // blocks % heads
    r, d = number % blocks * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    here, square = (r < ROWS)[:, None] & (d < D)[None, :], (d < D)[:, None] & (d < D)[None, :]
    row, entry = r[:, None] * D + d[None, :], d[:, None] * D + d[None, :]
    first, last = clip * frames * heads + head, frames - 1
    state = tl.load(increment_ptr + (first + last * heads) * ROWS * D + row, here, 0.0)
    for step in range(1, frames):
        at = first + (last - step) * heads
        tl.store(out_ptr + at * ROWS * D + row, state, here)
        if step < last:
            a = tl.load(transition_ptr + at * D * D + entry, square, 0.0)
            u = tl.load(increment_ptr + at * ROWS * D + row, here, 0.0)
            state = tl.dot(state, a, u, input_precision=PRECISION)
    tl.debug_barrier()  # another thread may read what one has stored
    state = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if start_ptr is not None:
        state = tl.load(start_ptr + (clip * heads + head) * ROWS * D + row, here, 0.0)
    for t in range(frames):
        at = first + t * heads
        a = tl.load(transition_ptr + at * D * D + entry, square, 0.0)
        u = tl.load(increment_ptr + at * ROWS * D + row, here, 0.0)
        state = tl.dot(state, a, u, input_precision=PRECISION)
        later = tl.load(out_ptr + at * ROWS * D + row, here & (t < last), 0.0)
        tl.store(out_ptr + at * ROWS * D + row, state + later, here)


@triton.jit
def _to_maps(
    start_ptr, forwards_ptr, backwards_ptr, to_forwards_ptr, to_backwards_ptr, d_transition_ptr, d_increment_ptr,
    frames, heads, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From the two scans' gradients to a frame's. Its transition moved the state before it: of the frames before, and
    of the frames after; the first frame's is what the forward scan starts from.
    """
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = frame * heads + head
    earlier = (frame % frames > 0) & (r < BLOCK_R)
    edge = (frame // frames * heads + head) * ROWS * D
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for first in range(0, ROWS, BLOCK_R):
        inside = (first + r < ROWS)[:, None] & (d < D)[None, :]
        here = at * ROWS * D + (first + r)[:, None] * D + d[None, :]
        to_forwards = tl.load(to_forwards_ptr + here, inside, 0.0)
        to_backwards = tl.load(to_backwards_ptr + here, inside, 0.0)
        tl.store(d_increment_ptr + here, to_forwards + to_backwards, inside)
        before = tl.load(forwards_ptr + here - heads * ROWS * D, inside & earlier[:, None], 0.0)
        start = start_ptr + edge + (first + r)[:, None] * D + d[None, :]
        before += tl.load(start, inside & (frame % frames == 0), 0.0)
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
    scanning forwards from `state` (B, H, V, D) or zeros, and of what the later frames left, scanning backwards."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, increment: Tensor, state: Tensor | None = None) -> Tensor:
        transition, increment = transition.contiguous(), increment.contiguous()
        start = increment.new_zeros(2, *increment[:, 0].shape)
        if state is not None:
            start[0] = state
        states, _ = carry(transition, increment, start)
        ctx.has_state = state is not None
        ctx.save_for_backward(transition, start, *states)
        return states[0] + states[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> Any:  # type: ignore[override]
        transition, start, *states = ctx.saved_tensors
        adjoints, d_start = carry(transition, d_states, torch.zeros_like(start), adjoint=True)
        return *to_maps(start, states, adjoints), d_start[0] if ctx.has_state else None


def carry(
    transition: Tensor,
    increment: Tensor,
    start: Tensor,
    adjoint: bool = False,
    keep: bool = True,
    only: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See `reference.carry`."""
    transition, increment, start = transition.contiguous(), increment.contiguous(), start.float().contiguous()
    b, t, h, added, d = increment.shape
    directions, rows = len(start), start.shape[-2]
    states = [torch.empty_like(increment) for _ in range(directions)] if keep else []
    end = torch.empty_like(start)
    forwards, backwards = (states or [end]) * (1 if len(states) == 2 else 2)
    _both_ways[triton.cdiv(rows, _ROWS), b * h, directions](
        transition, increment, start, forwards, backwards, end, b, t, h, rows, added, d, _ROWS, padded(d), adjoint,
        keep, only or 0, _PRECISION, num_warps=_WARPS, num_stages=_stages(increment),
    )  # fmt: skip
    return states, end


def summed(*scans: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
    """`reference.bidirectional_states` of one scan or two, of equal frames, heads and channels, for who wants no
    gradient.
    """
    given = [tuple(x if x is None else x.float().contiguous() for x in scan) for scan in scans]
    outs = [torch.empty_like(increment) for _, increment, _ in given]
    (_, t, h, rows, d), *others = (out.shape for out in outs)
    other, other_rows = ((*given[1], outs[1]), others[0][3]) if others else ((None,) * 4, 1)
    programs = [len(out) * h * triton.cdiv(out.shape[3], _ROWS_SUMMED) for out in outs]
    _summed[(sum(programs),)](
        *given[0], outs[0], programs[0], *other, t, h, rows, other_rows, d, _ROWS_SUMMED, padded(d), _PRECISION,
        num_warps=_WARPS, num_stages=_stages(outs[0]),
    )  # fmt: skip
    return outs


def to_maps(start: Tensor, states: Sequence[Tensor], adjoints: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `reference.to_maps`."""
    b, t, h, _, d = states[0].shape
    d_transition, d_increment = states[0].new_empty(b, t, h, d, d), torch.empty_like(states[0])
    _to_maps[b * t, h](
        start[0].contiguous(), *states, *adjoints, d_transition, d_increment, *_layout(d_increment), _PRECISION,
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

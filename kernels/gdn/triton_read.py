"""Reading the states in Triton: num = Q M^T over den = q z, a tile of a frame's tokens at a time.

The normaliser's queries q are the numerator's Q before rotation. Without a normaliser (z is None) the numerator is the
result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import by_token, contiguous_tokens, padded, precision, roomy, tile, warps

_WARPS, _TOKENS = 4, 32  # of the forward pass: of a program, and of a tile at most
_PROGRAMS = 512  # that a device is worth; where frames and heads are fewer, a frame's tokens are divided


@triton.jit
def _forward(
    q_ptr, state_ptr, plain_ptr, mass_ptr, out_ptr, stretch, q_token, plain_token, tokens, heads, q_head: tl.constexpr,
    plain_head: tl.constexpr, eps: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, NORMALISED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, c, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    at = frame * heads + head
    state = tl.load(state_ptr + at * V * D + c[:, None] * D + d[None, :], (c < V)[:, None] & (d < D)[None, :], 0.0)
    state = tl.trans(state.to(q_ptr.dtype.element_ty))
    if NORMALISED:
        mass = tl.load(mass_ptr + at * D + d, d < D, 0.0)
    first = tl.program_id(2) * stretch
    for start in range(first, min(first + stretch, tokens), BLOCK_S):
        inside = (start + s < tokens)[:, None]
        token = (frame * tokens + start + s)[:, None]
        q = tl.load(q_ptr + token * q_token + head * q_head + d[None, :], inside & (d < D)[None, :], 0.0)
        out = tl.dot(q, state, input_precision=PRECISION)
        if NORMALISED:
            from_plain = plain_ptr + token * plain_token + head * plain_head + d[None, :]
            plain = tl.load(from_plain, inside & (d < D)[None, :], 0.0)
            out /= tl.sum(plain.to(tl.float32) * mass[None, :], 1)[:, None] + eps
        to = out_ptr + (token * heads + head) * V + c[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), inside & (c < V)[None, :])


@triton.jit
def _both(
    q_ptr, plain_ptr, camera_q_ptr, state_ptr, camera_state_ptr, mass_ptr, out_ptr, camera_out_ptr, stretch, q_token,
    plain_token, camera_q_token, tokens, frames, heads, eps: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first axis of the grid: the frames of the main branch, normalised, and then the camera's."""
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    camera = frame >= frames
    if camera:
        frame -= frames
        q_ptr, q_token, state_ptr, out_ptr = camera_q_ptr, camera_q_token, camera_state_ptr, camera_out_ptr
    at = frame * heads + head
    square = (d < D)[:, None] & (d < D)[None, :]
    state = tl.load(state_ptr + at * D * D + d[:, None] * D + d[None, :], square, 0.0)
    state = tl.trans(state.to(q_ptr.dtype.element_ty))
    mass = tl.load(mass_ptr + at * D + d, d < D, 0.0)
    first = tl.program_id(2) * stretch
    for start in range(first, min(first + stretch, tokens), BLOCK_S):
        token = (frame * tokens + start + s)[:, None]
        inside = (start + s < tokens)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + token * q_token + head * D + d[None, :], inside, 0.0)
        out = tl.dot(q, state, input_precision=PRECISION)
        if not camera:
            plain = tl.load(plain_ptr + token * plain_token + head * D + d[None, :], inside, 0.0).to(tl.float32)
            out /= tl.sum(plain * mass[None, :], 1)[:, None] + eps
        to = out_ptr + (token * heads + head) * D + d[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    q_ptr, state_ptr, plain_ptr, mass_ptr, grad_ptr, dq_ptr, dstate_ptr, dplain_ptr, dmass_ptr, q_token, plain_token,
    tokens, heads, q_head: tl.constexpr, plain_head: tl.constexpr, eps: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, c, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    kind = q_ptr.dtype.element_ty
    at = frame * heads + head
    in_state = (c < V)[:, None] & (d < D)[None, :]
    state = tl.load(state_ptr + at * V * D + c[:, None] * D + d[None, :], in_state, 0.0).to(kind)
    dstate = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    if NORMALISED:
        mass = tl.load(mass_ptr + at * D + d, d < D, 0.0)
    dmass = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_S):
        inside = (start + s < tokens)[:, None]
        token = (frame * tokens + start + s)[:, None]
        in_d, in_v = inside & (d < D)[None, :], inside & (c < V)[None, :]
        q = tl.load(q_ptr + token * q_token + head * q_head + d[None, :], in_d, 0.0)
        grad = tl.load(grad_ptr + (token * heads + head) * V + c[None, :], in_v, 0.0).to(tl.float32)
        if NORMALISED:
            plain = tl.load(plain_ptr + token * plain_token + head * plain_head + d[None, :], in_d, 0.0).to(tl.float32)
            den = tl.sum(plain * mass[None, :], 1)[:, None] + eps
            grad /= den  # of num
        dq = tl.dot(grad.to(kind), state, input_precision=PRECISION)
        if NORMALISED:
            dden = -tl.sum(dq * q.to(tl.float32), 1)[:, None] / den  # (dq, q) is (grad, num)
            tl.store(dplain_ptr + (token * heads + head) * D + d[None, :], (dden * mass[None, :]).to(kind), in_d)
            dmass += tl.sum(dden * plain, 0)
        tl.store(dq_ptr + (token * heads + head) * D + d[None, :], dq.to(kind), in_d)
        dstate = tl.dot(tl.trans(grad.to(kind)), q, dstate, input_precision=PRECISION)
    tl.store(dstate_ptr + at * V * D + c[:, None] * D + d[None, :], dstate, in_state)
    if NORMALISED:
        tl.store(dmass_ptr + at * D + d, dmass, d < D)


class ReadStates(torch.autograd.Function):
    """q, plain (B, T, S, H, D) of one dtype; states (B, T, H, V, D) and mass (B, T, H, D) float32; plain and mass None
    without a normaliser. out (B, T, S, H, V) in q's dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, states: Tensor, plain: Tensor | None, mass: Tensor | None, eps: float) -> Tensor:
        q, states = contiguous_tokens(q), states.contiguous()
        plain = None if plain is None else contiguous_tokens(plain)
        mass = None if mass is None else mass.contiguous()
        b, t, s, h, _ = q.shape
        out = q.new_empty(b, t, s, h, states.shape[-2])
        layout = _layout(q, plain, states, eps, most=_TOKENS)
        stretch = _stretch(s, layout[-3], b * t * h)
        _forward[b * t, h, triton.cdiv(s, stretch)](q, states, plain, mass, out, stretch, *layout, num_warps=_WARPS)
        ctx.save_for_backward(q, states, plain, mass)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, states, plain, mass = ctx.saved_tensors
        b, t, _, h, _ = q.shape
        dq, dstates = q.new_empty(q.shape), torch.empty_like(states)
        dplain = None if plain is None else plain.new_empty(plain.shape)
        dmass = None if mass is None else torch.empty_like(mass)
        _backward[b * t, h](
            q, states, plain, mass, grad.contiguous(), dq, dstates, dplain, dmass,
            *_layout(q, plain, states, ctx.eps, most=64 if roomy(q) else 32), num_warps=warps(padded(q.shape[-1])),
            num_stages=2,
        )  # fmt: skip
        return dq, dstates, dplain, dmass, None


def read_both(
    main: tuple[Tensor, Tensor, Tensor, Tensor], camera_q: Tensor, camera_states: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the definition, by one launch: heads of q and plain (B, T, S, H, D) follow one another, states are square."""
    q, states, plain, mass = main
    b, t, s, h, d = q.shape
    (q, token), (plain, plain_token), (camera_q, camera_token) = (by_token(x) for x in (q, plain, camera_q))
    out, camera_out = (torch.empty(b, t, s, h, d, dtype=q.dtype, device=q.device) for _ in range(2))
    block_s = tile(s, 2 * padded(d), q.element_size())
    stretch = _stretch(s, block_s, b * t * h)
    _both[2 * b * t, h, triton.cdiv(s, stretch)](
        q, plain, camera_q, states.contiguous(), camera_states.contiguous(), mass.contiguous(), out, camera_out,
        stretch, token, plain_token, camera_token, s, b * t, h, eps, d, padded(d), block_s, precision(),
        num_warps=_WARPS,
    )  # fmt: skip
    return out, camera_out


def _stretch(tokens: int, block_s: int, heads: int) -> int:
    """Tokens of a program, whole tiles of them, where there are so many heads in all frames."""
    stretches = max(1, min(triton.cdiv(tokens, block_s), _PROGRAMS // heads))
    return triton.cdiv(triton.cdiv(tokens, stretches), block_s) * block_s


def _layout(q: Tensor, plain: Tensor | None, states: Tensor, eps: float, most: int) -> tuple:
    """The last arguments of both kernels; most: tokens of a tile."""
    (_, _, tokens, heads, d), rows = q.shape, states.shape[-2]
    other = q if plain is None else plain
    block_d, block_v = padded(d), padded(rows)
    block_s = min(most, tile(tokens, block_d + block_v, q.element_size()))
    strides = q.stride(2), other.stride(2), tokens, heads, q.stride(3), other.stride(3)
    return *strides, eps, d, rows, block_d, block_v, block_s, plain is not None, precision()

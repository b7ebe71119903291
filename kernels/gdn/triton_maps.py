"""`frame_maps` in Triton: a program reduces a frame's tokens, of one head, to the frame's two matrices; or, where
nobody wants a gradient, to one of them.

A is D x D and U is V x D, in registers; tokens pass by in tiles. Backwards, with P = K^T diag(b) K and Q = dP + dP^T,
a tile's dK = b (K Q + V dU) and dV = b K dU^T; and db = (K Q + V dU, K) / 2 + (K dU^T, V) / 2 by rows, because
(V dU, K) = (K dU^T, V).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import by_token, contiguous_tokens, padded, precision, roomy, tile, warps

_WARPS_OF_EVERY, _STAGES_OF_EVERY = 4, 3  # each has one matrix in registers, not two


@triton.jit
def _forward(
    k_ptr, v_ptr, beta_ptr, decay_ptr, transition_ptr, increment_ptr,
    k_token, v_token, tokens, heads, k_head: tl.constexpr, v_head: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, c, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    erased = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    written = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_S):
        inside = start + s < tokens
        token = (frame * tokens + start + s)[:, None]
        k = tl.load(k_ptr + token * k_token + head * k_head + d[None, :], inside[:, None] & (d < D)[None, :], 0.0)
        v = tl.load(v_ptr + token * v_token + head * v_head + c[None, :], inside[:, None] & (c < V)[None, :], 0.0)
        beta = tl.load(beta_ptr + token * heads + head, inside[:, None], 0.0)
        weighted = (k.to(tl.float32) * beta).to(k.dtype)
        erased = tl.dot(tl.trans(k), weighted, erased, input_precision=PRECISION)
        written = tl.dot(tl.trans(v), weighted, written, input_precision=PRECISION)
    at = frame * heads + head
    decay = tl.load(decay_ptr + at)
    identity = tl.where(d[:, None] == d[None, :], 1.0, 0.0)
    square = (d < D)[:, None] & (d < D)[None, :]
    tl.store(transition_ptr + at * D * D + d[:, None] * D + d[None, :], decay * (identity - erased), square)
    tl.store(increment_ptr + at * V * D + c[:, None] * D + d[None, :], written, (c < V)[:, None] & (d < D)[None, :])


@triton.jit
def _every(
    k_ptr, v_ptr, beta_ptr, k_token, v_token, camera_k_ptr, camera_v_ptr, camera_beta_ptr, camera_k_token,
    camera_v_token, plain_ptr, plain_token, decay_ptr, transition_ptr, increment_ptr, mass_transition_ptr, mass_ptr,
    frames, tokens, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The third axis of the grid: the normaliser, whose values are 1, then a program for each map of a branch."""
    frame, head, which = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    at, offset = frame * heads + head, frame * tokens * heads + head
    if which == 0:
        plain_ptr += frame * tokens * plain_token + head * D
        sums = _transition(
            plain_ptr, plain_token, beta_ptr + offset, decay_ptr + at, mass_transition_ptr + at * D * D, heads, tokens,
            D, BLOCK_D, BLOCK_S, True, PRECISION,
        )  # fmt: skip
        tl.store(mass_ptr + at * D + d, sums, d < D)
    else:
        if which > 2:
            k_ptr, v_ptr, beta_ptr, k_token, v_token = (
                camera_k_ptr, camera_v_ptr, camera_beta_ptr, camera_k_token, camera_v_token
            )  # fmt: skip
            at += frames * heads
        k_ptr += frame * tokens * k_token + head * D
        if which % 2 == 1:
            _transition(
                k_ptr, k_token, beta_ptr + offset, decay_ptr + frame * heads + head, transition_ptr + at * D * D,
                heads, tokens, D, BLOCK_D, BLOCK_S, False, PRECISION,
            )  # fmt: skip
        else:
            v_ptr += frame * tokens * v_token + head * D
            written, _ = _product(
                v_ptr, v_token, k_ptr, k_token, beta_ptr + offset, heads, tokens, D, BLOCK_D, BLOCK_S, False, PRECISION
            )
            square = (d < D)[:, None] & (d < D)[None, :]
            tl.store(increment_ptr + at * D * D + d[:, None] * D + d[None, :], written, square)


@triton.jit
def _transition(
    k_ptr, k_token, beta_ptr, decay_ptr, out_ptr, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store decay (I - K^T diag(beta) K); the sums of `_product`."""
    d = tl.arange(0, BLOCK_D)
    erased, sums = _product(
        k_ptr, k_token, k_ptr, k_token, beta_ptr, heads, tokens, D, BLOCK_D, BLOCK_S, SUMS, PRECISION
    )
    identity = tl.where(d[:, None] == d[None, :], 1.0, 0.0)
    square = (d < D)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + d[:, None] * D + d[None, :], tl.load(decay_ptr) * (identity - erased), square)
    return sums


@triton.jit
def _product(
    x_ptr, x_token, k_ptr, k_token, beta_ptr, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X^T diag(beta) K over a frame's tokens; if SUMS, also of X = 1, else zeros."""
    d, s = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_S)[:, None]
    product, sums = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_S):
        token = (start + s).to(tl.int64)
        inside = (token < tokens) & (d < D)
        x = tl.load(x_ptr + token * x_token + d, inside, 0.0)
        k = tl.load(k_ptr + token * k_token + d, inside, 0.0)
        beta = tl.load(beta_ptr + token * heads, token < tokens, 0.0)
        weighted = (k.to(tl.float32) * beta).to(k.dtype)
        product = tl.dot(tl.trans(x), weighted, product, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(weighted.to(tl.float32), 0)
    return product, sums


@triton.jit
def _backward(
    k_ptr, v_ptr, beta_ptr, decay_ptr, transition_ptr, d_transition_ptr, d_increment_ptr, dk_ptr, dv_ptr, dbeta_ptr,
    ddecay_ptr, k_token, v_token, tokens, heads, k_head: tl.constexpr, v_head: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    kind = k_ptr.dtype.element_ty
    at = frame * heads + head
    square = (d < D)[:, None] & (d < D)[None, :]
    grad = tl.load(d_transition_ptr + at * D * D + d[:, None] * D + d[None, :], square, 0.0)
    flipped = tl.load(d_transition_ptr + at * D * D + d[None, :] * D + d[:, None], square, 0.0)
    decay = tl.load(decay_ptr + at)
    # A = g (I - P), so I - P is A / g; a decay that is 0 in float32 has lost it, and its gate's gradient with it.
    transition = tl.load(transition_ptr + at * D * D + d[:, None] * D + d[None, :], square, 0.0)
    tl.store(ddecay_ptr + at, tl.sum(grad * transition) / tl.maximum(decay, 1e-30))
    both = (-decay * (grad + flipped)).to(kind)
    d_increment_ptr += at * V * D
    once: tl.constexpr = BLOCK_V >= V
    if once:
        d_increment = _rows(d_increment_ptr, 0, d, D, V, BLOCK_V).to(kind)
    for start in range(0, tokens, BLOCK_S):
        inside = start + s < tokens
        token = (frame * tokens + start + s)[:, None]
        in_k = inside[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + token * k_token + head * k_head + d[None, :], in_k, 0.0)
        beta = tl.load(beta_ptr + token * heads + head, inside[:, None], 0.0)
        to_k = tl.dot(k, both, input_precision=PRECISION)
        dbeta = tl.zeros([BLOCK_S], tl.float32)
        for first in tl.static_range(0, V, BLOCK_V):
            c = first + tl.arange(0, BLOCK_V)
            in_v = inside[:, None] & (c < V)[None, :]
            v = tl.load(v_ptr + token * v_token + head * v_head + c[None, :], in_v, 0.0)
            if not once:
                d_increment = _rows(d_increment_ptr, first, d, D, V, BLOCK_V).to(kind)
            to_v = tl.dot(k, tl.trans(d_increment), input_precision=PRECISION)
            tl.store(dv_ptr + (token * heads + head) * V + c[None, :], (beta * to_v).to(kind), in_v)
            dbeta += tl.sum(to_v * v.to(tl.float32), 1)
            to_k = tl.dot(v, d_increment, to_k, input_precision=PRECISION)
        tl.store(dk_ptr + (token * heads + head) * D + d[None, :], (beta * to_k).to(kind), in_k)
        dbeta = 0.5 * (dbeta + tl.sum(to_k * k.to(tl.float32), 1))
        tl.store(dbeta_ptr + token * heads + head, dbeta[:, None], inside[:, None])


@triton.jit
def _rows(ptr, first, d, D: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Rows `first` and following of a V x D matrix."""
    c = first + tl.arange(0, BLOCK_V)
    return tl.load(ptr + c[:, None] * D + d[None, :], (c < V)[:, None] & (d < D)[None, :], 0.0)


class FrameMaps(torch.autograd.Function):
    """Of each branch k (B, T, S, H, D), v (B, T, S, H, V) of one dtype and beta (B, T, S, H); decay (B, T, H) and the
    maps, one branch's after another's along the batch, float32.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, *branches: Tensor) -> tuple[Tensor, Tensor]:
        (b, t, _, h, d), rows = branches[0].shape, branches[1].shape[-1]
        decay, branches = decay.contiguous(), tuple(_prepared(*branches))
        transition = torch.empty(len(branches) // 3 * b, t, h, d, d, device=decay.device)
        increment = torch.empty(len(branches) // 3 * b, t, h, rows, d, device=decay.device)
        for (k, v, beta), *maps in zip(_threes(branches), transition.split(b), increment.split(b), strict=True):
            _forward[b * t, h](k, v, beta, decay, *maps, *_layout(k, v), num_warps=warps(padded(d)))
        ctx.save_for_backward(decay, transition, *branches)
        return transition, increment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_transition: Tensor, d_increment: Tensor) -> Any:  # type: ignore[override]
        decay, transition, *branches = ctx.saved_tensors
        b, t, _, h, d = branches[0].shape
        d_transition, d_increment = d_transition.contiguous(), d_increment.contiguous()
        found: list[Tensor] = []
        ddecay = torch.empty(len(branches) // 3, b, t, h, device=decay.device)
        maps = transition.split(b), d_transition.split(b), d_increment.split(b)
        for (k, v, beta), to_decay, *of_maps in zip(_threes(branches), ddecay, *maps, strict=True):
            grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, beta)]
            _backward[b * t, h](
                k, v, beta, decay, *of_maps, *grads, to_decay, *_layout(k, v, divided=not roomy(k)),
                num_warps=warps(padded(d)), num_stages=2 if roomy(k) else 1,
            )  # fmt: skip
            found += grads
        return ddecay.sum(0), *found


def every_map(
    branches: Sequence[tuple[Tensor, Tensor, Tensor]], plain: Tensor, decay: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The maps of one or two branches, D channels of values as of keys, and those of the normaliser, by one launch."""
    (main, *others), (b, t, s, h, d) = branches, plain.shape
    sets = [_branch(*branch) for branch in (main, *(others or [main]))]
    (plain, token), decay = by_token(plain), decay.contiguous()
    transition = torch.empty(len(branches) * b, t, h, d, d, device=decay.device)
    increment, mass_transition = torch.empty_like(transition), torch.empty(b, t, h, d, d, device=decay.device)
    mass = torch.empty(b, t, h, 1, d, device=decay.device)
    _every[b * t, h, 1 + 2 * len(branches)](
        *sets[0], *sets[1], plain, token, decay, transition, increment, mass_transition, mass, b * t, s, h, d,
        padded(d), tile(s, 2 * padded(d), plain.element_size()), precision(), num_warps=_WARPS_OF_EVERY,
        num_stages=_STAGES_OF_EVERY,
    )  # fmt: skip
    return (transition, increment), (mass_transition, mass)


def _branch(k: Tensor, v: Tensor, beta: Tensor) -> tuple:
    (k, k_token), (v, v_token) = by_token(k), by_token(v)
    return k, v, beta.float().contiguous(), k_token, v_token


def _prepared(*branches: Tensor) -> Iterator[Tensor]:
    for k, v, beta in _threes(branches):
        yield from (contiguous_tokens(k), contiguous_tokens(v), beta.float().contiguous())


def _threes(branches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(branches[::3], branches[1::3], branches[2::3], strict=True)


def _layout(k: Tensor, v: Tensor, divided: bool = False) -> tuple:
    """The last arguments of both kernels; divided: value channels in halves, by smaller tiles of tokens."""
    (_, _, tokens, heads, d), rows = k.shape, v.shape[-1]
    block_d, block_v = padded(d), padded(rows)
    block_s = tile(tokens, block_d + block_v, k.element_size())
    if divided:
        block_s, block_v = 16, max(16, block_v // 2)
    strides = k.stride(2), v.stride(2), tokens, heads, k.stride(3), v.stride(3)
    return *strides, d, rows, block_d, block_v, block_s, precision()

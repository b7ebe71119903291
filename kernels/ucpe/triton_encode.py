"""`encode` in Triton: a token is read once and written once, some heads at a time.

Channels are kept as groups of 4, each channel of the group a tensor of its own: a group is two rotated pairs, or what a
ray's 4 x 4 matrix multiplies, so that U needs no other lane. Legend: x input, y plain, e = U y under rotation or UCPE,
f = r e with r <= 1 the downscaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import padded

_DOWNSCALE_EPS = tl.constexpr(1e-6)
_LEAST_NORM = tl.constexpr(1e-6)
_PROGRAMS = 2048  # that share the tokens of a backward pass; each leaves its part of the weight's gradient
_BACKWARD_WARPS = 2


@triton.jit
def _groups(x):
    """(heads, 4 G) as four of (heads, G): the first, second, third and fourth channel of every group."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _channels(x):
    """The inverse of `_groups`."""
    even, odd = tl.join(x[0], x[2]), tl.join(x[1], x[3])
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], x[0].shape[1] * 4))


@triton.jit
def _load(ptr, at, inside):
    return _groups(tl.load(ptr + at, inside, 0.0).to(tl.float32))


@triton.jit
def _store(ptr, at, x, inside):
    tl.store(ptr + at, _channels(x).to(ptr.dtype.element_ty), inside)


@triton.jit
def _dot(a, b):
    """Sum over channels, by head."""
    return tl.sum(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3], 1)[:, None]


@triton.jit
def _plain(x, weight, factor, scale, RELU: tl.constexpr, NORM: tl.constexpr):
    """One channel's y."""
    y = x * (factor * weight) if NORM else x
    return (tl.maximum(y, 0.0) if RELU else y) * scale


@triton.jit
def _plains(x, weight, factor, scale, RELU: tl.constexpr, NORM: tl.constexpr):
    return (
        _plain(x[0], weight[0], factor, scale, RELU, NORM),
        _plain(x[1], weight[1], factor, scale, RELU, NORM),
        _plain(x[2], weight[2], factor, scale, RELU, NORM),
        _plain(x[3], weight[3], factor, scale, RELU, NORM),
    )


@triton.jit
def _turn(x, rope, sign, ray, of_rays, RAYS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """U x, or its transpose; rope holds cosine and sine of both pairs, `ray` the matrix by rows."""
    cos, sin, cos_2, sin_2 = rope[0], rope[1] * sign, rope[2], rope[3] * sign
    a, b = x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos
    c, d = x[2] * cos_2 - x[3] * sin_2, x[2] * sin_2 + x[3] * cos_2
    if RAYS:
        across: tl.constexpr = 4 if TRANSPOSED else 1
        down: tl.constexpr = 1 if TRANSPOSED else 4
        a = tl.where(of_rays, _row(x, ray, 0, across), a)
        b = tl.where(of_rays, _row(x, ray, down, across), b)
        c = tl.where(of_rays, _row(x, ray, 2 * down, across), c)
        d = tl.where(of_rays, _row(x, ray, 3 * down, across), d)
    return a, b, c, d


@triton.jit
def _row(x, ray, start: tl.constexpr, step: tl.constexpr):
    return x[0] * ray[start] + x[1] * ray[start + step] + x[2] * ray[start + 2 * step] + x[3] * ray[start + 3 * step]


@triton.jit
def _ray(ptr, row, column, RAYS: tl.constexpr):
    """The sixteen entries of a token's matrix."""
    if RAYS:
        return (
            tl.load(ptr), tl.load(ptr + column), tl.load(ptr + 2 * column), tl.load(ptr + 3 * column),
            tl.load(ptr + row), tl.load(ptr + row + column), tl.load(ptr + row + 2 * column),
            tl.load(ptr + row + 3 * column),
            tl.load(ptr + 2 * row), tl.load(ptr + 2 * row + column), tl.load(ptr + 2 * row + 2 * column),
            tl.load(ptr + 2 * row + 3 * column),
            tl.load(ptr + 3 * row), tl.load(ptr + 3 * row + column), tl.load(ptr + 3 * row + 2 * column),
            tl.load(ptr + 3 * row + 3 * column),
        )  # fmt: skip
    return (0.0,) * 16


@triton.jit
def _factor(x_ptr, h, d, inside, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr):
    """One over the root mean square of the token's channels."""
    if NORM:
        squares = tl.zeros([BLOCK_H, d.shape[1]], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            x = tl.load(x_ptr + (first + h) * D + d, inside, 0.0).to(tl.float32)
            squares += x * x
        return tl.rsqrt(tl.sum(squares) / (H * D) + eps)
    return 1.0


@triton.jit
def _shrinking(y2, e2, D: tl.constexpr):
    return tl.minimum(tl.sqrt(y2 / D + _DOWNSCALE_EPS) / tl.sqrt(e2 / D + _DOWNSCALE_EPS), 1.0)


@triton.jit
def _scaled(x, by):
    return x[0] * by, x[1] * by, x[2] * by, x[3] * by


@triton.jit
def _added(x, y, by):
    """x + by y."""
    return x[0] + by * y[0], x[1] + by * y[1], x[2] + by * y[2], x[3] + by * y[3]


@triton.jit
def _forward(
    x_ptr, weight_ptr, matrix_ptr, rope_ptr, plain_ptr, encoded_ptr, inflation_ptr, x_token, tokens, matrix_token, row,
    column, scale, eps, sign, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, DOWNSCALE: tl.constexpr,
    PLAIN: tl.constexpr, INFLATION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (h < BLOCK_H) & (d < D)
    of_rays = (tl.arange(0, BLOCK_D // 4) * 4 < HALF)[None, :]
    x_ptr += token * x_token
    rope = _load(rope_ptr + token % tokens * (D - HALF), d - HALF, (d >= HALF) & (d < D))
    ray = _ray(matrix_ptr + token * matrix_token, row, column, HALF > 0)
    factor = _factor(x_ptr, h, d, inside, eps, H, D, BLOCK_H, NORM)
    for first in tl.static_range(0, H, BLOCK_H):
        at = (first + h) * D + d
        x = _load(x_ptr, at, inside)
        weight = _load(weight_ptr, at, inside) if NORM else x
        y = _plains(x, weight, factor, scale, RELU, NORM)
        e = _turn(y, rope, sign, ray, of_rays, HALF > 0, False)
        if DOWNSCALE:
            e = _scaled(e, _shrinking(_dot(y, y), _dot(e, e), D))
        if PLAIN:
            _store(plain_ptr + token * H * D, at, y, inside)
        _store(encoded_ptr + token * H * D, at, e, inside)
        if INFLATION:
            before = tl.maximum(tl.sqrt(_dot(y, y)), _LEAST_NORM)
            growth = tl.maximum(tl.sqrt(_dot(e, e)), _LEAST_NORM) / before
            tl.store(inflation_ptr + token * H + first + h, growth * growth)


@triton.jit
def _to_rays(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, q_matrix_ptr, matrix_ptr, rope_ptr, q_out_ptr, k_out_ptr,
    v_out_ptr, inflation_ptr, q_token, k_token, v_token, tokens, q_matrix_token, q_row, q_column, matrix_token, row,
    column, k_scale, eps, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, RELU: tl.constexpr, DOWNSCALE: tl.constexpr,
):  # fmt: skip
    """`_forward` of all three. The second axis of the grid: queries, keys, values."""
    which = tl.program_id(1)
    if which == 0:
        _forward(
            q_ptr, q_weight_ptr, q_matrix_ptr, rope_ptr, None, q_out_ptr, None, q_token, tokens, q_matrix_token, q_row,
            q_column, 1.0, eps, 1.0, H, D, HALF, BLOCK_H, BLOCK_D, True, RELU, DOWNSCALE, False, False,
        )  # fmt: skip
    elif which == 1:
        _forward(
            k_ptr, k_weight_ptr, matrix_ptr, rope_ptr, None, k_out_ptr, inflation_ptr, k_token, tokens, matrix_token,
            row, column, k_scale, eps, 1.0, H, D, HALF, BLOCK_H, BLOCK_D, True, RELU, DOWNSCALE, False, True,
        )  # fmt: skip
    else:
        _forward(
            v_ptr, None, matrix_ptr, rope_ptr, None, v_out_ptr, None, v_token, tokens, matrix_token, row, column, 1.0,
            eps, 1.0, H, D, HALF, BLOCK_H, BLOCK_D, False, False, DOWNSCALE, False, False,
        )  # fmt: skip


@triton.jit
def _backward(
    x_ptr, weight_ptr, matrix_ptr, rope_ptr, d_plain_ptr, d_encoded_ptr, d_inflation_ptr, dx_ptr, d_weight_ptr, x_token,
    tokens, all_tokens, matrix_token, row, column, scale, eps, sign, H: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr,
    DOWNSCALE: tl.constexpr, PLAIN: tl.constexpr, ENCODED: tl.constexpr, INFLATION: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (h < BLOCK_H) & (d < D)
    of_rays = (tl.arange(0, BLOCK_D // 4) * 4 < HALF)[None, :]
    least: tl.constexpr = _LEAST_NORM * _LEAST_NORM
    empty = tl.zeros([BLOCK_H, BLOCK_D // 4], tl.float32)
    nothing = (empty, empty, empty, empty)
    d_weights = (nothing,) * (H // BLOCK_H)
    for number in range(tl.program_id(0), all_tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        from_x, here = x_ptr + token * x_token, token * H * D
        rope = _load(rope_ptr + token % tokens * (D - HALF), d - HALF, (d >= HALF) & (d < D))
        ray = _ray(matrix_ptr + token * matrix_token, row, column, HALF > 0)
        factor = _factor(from_x, h, d, inside, eps, H, D, BLOCK_H, NORM)
        through = 0.0  # the normalisation: sum of dy x over all heads
        dys = ()
        to_weights = ()
        for first in tl.static_range(0, H, BLOCK_H):
            at = (first + h) * D + d
            x = _load(from_x, at, inside)
            weight = _load(weight_ptr, at, inside) if NORM else x
            y = _plains(x, weight, factor, scale, RELU, NORM)
            dy = _load(d_plain_ptr + here, at, inside) if PLAIN else nothing
            de = _load(d_encoded_ptr + here, at, inside) if ENCODED else nothing
            if DOWNSCALE or INFLATION:
                e = _turn(y, rope, sign, ray, of_rays, HALF > 0, False)
                y2, e2 = _dot(y, y), _dot(e, e)
                shrink = _shrinking(y2, e2, D) if DOWNSCALE else tl.full([BLOCK_H, 1], 1.0, tl.float32)  # r
                direct = tl.zeros([BLOCK_H, 1], tl.float32)  # of dL/dy, along y
                grow = tl.zeros([BLOCK_H, 1], tl.float32)  # of dL/df, along f
                if INFLATION:
                    f2 = e2 * shrink * shrink
                    d_inflation = tl.load(d_inflation_ptr + token * H + first + h)
                    grow = tl.where(f2 > least, 2 * d_inflation / tl.maximum(y2, least), 0.0)
                    inflation = tl.maximum(f2, least) / tl.maximum(y2, least)
                    direct -= tl.where(y2 > least, 2 * d_inflation * inflation / tl.maximum(y2, least), 0.0)
                along = grow * shrink * shrink  # dL/de = r dL/df + along e
                if DOWNSCALE:
                    d_shrink = grow * shrink * e2
                    if ENCODED:
                        d_shrink += _dot(de, e)
                    d_shrink = tl.where(shrink < 1, d_shrink * shrink, 0.0)
                    along -= d_shrink / (e2 + D * _DOWNSCALE_EPS)
                    direct += d_shrink / (y2 + D * _DOWNSCALE_EPS)
                dy = _added(dy, y, direct)
                de = _added(_scaled(de, shrink), e, along)
            dy = _scaled(_added(dy, _turn(de, rope, -sign, ray, of_rays, HALF > 0, True), 1.0), scale)
            if RELU:
                dy = (
                    tl.where(y[0] * scale > 0, dy[0], 0.0), tl.where(y[1] * scale > 0, dy[1], 0.0),
                    tl.where(y[2] * scale > 0, dy[2], 0.0), tl.where(y[3] * scale > 0, dy[3], 0.0),
                )  # fmt: skip
            if NORM:
                x = _scaled(x, factor)
                to_weights = to_weights + ((dy[0] * x[0], dy[1] * x[1], dy[2] * x[2], dy[3] * x[3]),)
                dy = (dy[0] * weight[0], dy[1] * weight[1], dy[2] * weight[2], dy[3] * weight[3])
                through += tl.sum(_dot(dy, x))
                dys = dys + (dy,)
            else:
                _store(dx_ptr + here, at, dy, inside)
        if NORM:
            d_weights = _all_added(d_weights, to_weights)
            for first in tl.static_range(0, H, BLOCK_H):
                at = (first + h) * D + d
                x = _scaled(_load(from_x, at, inside), factor)
                dx = _scaled(_added(dys[first // BLOCK_H], x, -through / (H * D)), factor)
                _store(dx_ptr + here, at, dx, inside)
    if NORM:
        for first in tl.static_range(0, H, BLOCK_H):
            _store(d_weight_ptr + tl.program_id(0) * H * D, (first + h) * D + d, d_weights[first // BLOCK_H], inside)


@triton.jit
def _all_added(xs, ys):
    sums = ()
    for i in tl.static_range(len(xs)):
        sums = sums + (_added(xs[i], ys[i], 1.0),)
    return sums


class Encode(torch.autograd.Function):
    """x (B, N, H, D), weight (H D), float32 matrix (B, N, 4, 4) and rope (N, D / 2 or D / 4, 2); as the definition,
    outputs in x's dtype, the inflation float32. wanted: whether plain and inflation are, which are None otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        matrix: Tensor | None,
        rope: Tensor,
        options: tuple,
        wanted: tuple,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        x, rope = _rows(x), rope.contiguous()
        b, n, h, d = x.shape
        relu, scale, downscale, inverse, eps = options
        plain = x.new_empty(x.shape) if wanted[0] else None
        encoded = x.new_empty(x.shape) if into is None else into
        inflation = torch.empty(b, n, h, device=x.device) if wanted[1] else None
        sizes, sign = _sizes(x, matrix), -1.0 if inverse else 1.0
        _forward[b * n,](
            x, weight, matrix if matrix is not None else x, rope, plain, encoded, inflation, x.stride(1), n,
            *_matrix_strides(matrix), scale, eps, sign, *sizes, weight is not None, relu, downscale, *wanted,
            num_warps=2,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, matrix, rope)
        ctx.options = options
        return encoded, plain, inflation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_encoded: Tensor | None, d_plain: Tensor | None, d_inflation: Tensor | None) -> Any:  # type: ignore[override]
        x, weight, matrix, rope = ctx.saved_tensors
        b, n, h, d = x.shape
        relu, scale, downscale, inverse, eps = ctx.options
        grads = tuple(None if grad is None else grad.contiguous() for grad in (d_plain, d_encoded, d_inflation))
        programs = min(_PROGRAMS, b * n)
        dx = x.new_empty(x.shape)
        parts = None if weight is None else torch.empty(programs, h * d, device=x.device)
        sizes, sign = _sizes(x, matrix), -1.0 if inverse else 1.0
        _backward[programs,](
            x, weight, matrix if matrix is not None else x, rope, *grads, dx, parts, x.stride(1), n, b * n,
            *_matrix_strides(matrix), scale, eps, sign, *sizes, weight is not None, relu, downscale,
            *(grad is not None for grad in grads), num_warps=_BACKWARD_WARPS,
        )  # fmt: skip
        return dx, None if weight is None else parts.sum(0).to(weight.dtype), *(None,) * 5  # type: ignore[union-attr]


def to_rays(
    branch: Sequence[Tensor],
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor],
    rope: Tensor,
    options: tuple,
    into: Sequence[Tensor],
) -> Tensor:
    """Queries, keys and values (B, N, H, D), those with their weights, under their matrices, into memory by one launch,
    for who wants no gradient; the keys' inflation.
    """
    branch, (relu, scale, downscale, eps) = tuple(_rows(x) for x in branch), options
    b, n, h, _ = branch[0].shape
    inflation = torch.empty(b, n, h, device=rope.device)
    _to_rays[b * n, 3](
        *branch, *weights, *matrices, rope.contiguous(), *into, inflation, *(x.stride(1) for x in branch), n,
        *_matrix_strides(matrices[0]), *_matrix_strides(matrices[1]), scale, eps, *_sizes(branch[0], matrices[0]), relu,
        downscale, num_warps=2,
    )  # fmt: skip
    return inflation


def _rows(x: Tensor) -> Tensor:
    """x such that a token is x.stride(1) after the last one, over all clips, and its channels lie together."""
    b, n, _, d = x.shape
    regular = x.stride(3) == 1 and x.stride(2) == d and (b == 1 or x.stride(0) == n * x.stride(1))
    return x if regular else x.contiguous()


def _matrix_strides(matrix: Tensor | None) -> tuple[int, int, int]:
    """Of a token, a row and a column; the matrices of all clips follow one another."""
    if matrix is None:
        return 0, 0, 0
    assert matrix.dtype == torch.float32 and matrix.stride(0) == matrix.shape[1] * matrix.stride(1)
    return matrix.stride(1), matrix.stride(2), matrix.stride(3)


def _sizes(x: Tensor, matrix: Tensor | None) -> tuple[int, int, int, int, int]:
    """Heads, channels, those under the ray's matrix; and of a tile, the heads and the channels."""
    h, d = x.shape[2:]
    return h, d, d // 2 if matrix is not None else 0, math.gcd(h, 4), padded(d)

"""`encode` in Triton: one token a program, all of its heads in one tile, read once and written once.

Channels of other lanes (the partner of a rotation, the three others of a group of 4) are loaded again, from the first
level of cache. Legend: x input, y plain, e = U y under rotation or UCPE, f = r e with r <= 1 the downscaling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.launch import padded

_DOWNSCALE_EPS = tl.constexpr(1e-6)
_LEAST_NORM = tl.constexpr(1e-6)
_PROGRAMS = 1024  # that share the tokens of a backward pass; each leaves its part of the weight's gradient


@triton.jit
def _load(ptr, h, d, inside, H: tl.constexpr, D: tl.constexpr):
    return tl.load(ptr + h * D + d, inside, 0.0).to(tl.float32)


@triton.jit
def _plain(x_ptr, weight_ptr, h, d, inside, rstd, scale, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
           RELU: tl.constexpr):  # fmt: skip
    """y of the channels d, which may be another lane's."""
    y = _load(x_ptr, h, d, inside, H, D)
    if NORM:
        y = y * rstd * _load(weight_ptr, h, d, inside, H, D)
    if RELU:
        y = tl.maximum(y, 0.0)
    return y * scale


@triton.jit
def _turn(rope_ptr, d, HALF: tl.constexpr, D: tl.constexpr, INVERSE: tl.constexpr):
    """Cosine and signed sine of channels d: a rotated channel is cosine x own + signed sine x partner."""
    rotated = (d >= HALF) & (d < D)
    pair = (d - HALF) // 2
    cos, sin = tl.load(rope_ptr + 2 * pair, rotated, 0.0), tl.load(rope_ptr + 2 * pair + 1, rotated, 0.0)
    return cos, tl.where((d % 2 == 0) != INVERSE, -sin, sin)


@triton.jit
def _encoded(x_ptr, weight_ptr, matrix_ptr, rope_ptr, y, h, d, inside, rstd, scale, row, column, H: tl.constexpr,
             D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr,
             INVERSE: tl.constexpr):  # fmt: skip
    """U y: the first HALF channels under the ray's matrix, the others rotated."""
    cos, sin = _turn(rope_ptr, d, HALF, D, INVERSE)
    e = y * cos + _plain(x_ptr, weight_ptr, h, d ^ 1, inside, rstd, scale, H, D, NORM, RELU) * sin
    if HALF > 0:
        for j in tl.static_range(4):
            entry = tl.load(matrix_ptr + (d % 4) * row + j * column, d < HALF, 0.0)
            e += entry * _plain(x_ptr, weight_ptr, h, d // 4 * 4 + j, inside, rstd, scale, H, D, NORM, RELU)
    return e


@triton.jit
def _forward(
    x_ptr, weight_ptr, matrix_ptr, rope_ptr, plain_ptr, encoded_ptr, inflation_ptr, x_token, tokens, matrix_token, row,
    column, scale, eps, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, DOWNSCALE: tl.constexpr, INVERSE: tl.constexpr,
    PLAIN: tl.constexpr, INFLATION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (h < H) & (d < D)
    x_ptr += token * x_token
    matrix_ptr += token * matrix_token
    rope_ptr += token % tokens * (D - HALF)
    rstd = 1.0
    if NORM:
        x = _load(x_ptr, h, d, inside, H, D)
        rstd = tl.rsqrt(tl.sum(x * x) / (H * D) + eps)
    y = _plain(x_ptr, weight_ptr, h, d, inside, rstd, scale, H, D, NORM, RELU)
    e = _encoded(x_ptr, weight_ptr, matrix_ptr, rope_ptr, y, h, d, inside, rstd, scale, row, column, H, D, HALF, NORM,
                 RELU, INVERSE)  # fmt: skip
    if DOWNSCALE:
        target = tl.sqrt(tl.sum(y * y, 1) / D + _DOWNSCALE_EPS)
        e *= tl.minimum(target / tl.sqrt(tl.sum(e * e, 1) / D + _DOWNSCALE_EPS), 1.0)[:, None]
    here = token * H * D + h * D + d
    if PLAIN:
        tl.store(plain_ptr + here, y.to(plain_ptr.dtype.element_ty), inside)
    tl.store(encoded_ptr + here, e.to(encoded_ptr.dtype.element_ty), inside)
    if INFLATION:
        before = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), _LEAST_NORM)
        growth = tl.maximum(tl.sqrt(tl.sum(e * e, 1)), _LEAST_NORM) / before
        heads = tl.arange(0, BLOCK_H)
        tl.store(inflation_ptr + token * H + heads, growth * growth, heads < H)


@triton.jit
def _backward(
    x_ptr, weight_ptr, matrix_ptr, rope_ptr, d_plain_ptr, d_encoded_ptr, d_inflation_ptr, dx_ptr, d_weight_ptr, x_token,
    tokens, all_tokens, matrix_token, row, column, scale, eps, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, DOWNSCALE: tl.constexpr,
    INVERSE: tl.constexpr, PLAIN: tl.constexpr, ENCODED: tl.constexpr, INFLATION: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    heads = tl.arange(0, BLOCK_H)
    inside = (h < H) & (d < D)
    d_weight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for number in range(tl.program_id(0), all_tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        at, rays = x_ptr + token * x_token, matrix_ptr + token * matrix_token
        rope = rope_ptr + token % tokens * (D - HALF)
        here = token * H * D
        x = _load(at, h, d, inside, H, D)
        rstd = 1.0
        if NORM:
            rstd = tl.rsqrt(tl.sum(x * x) / (H * D) + eps)
        y = _plain(at, weight_ptr, h, d, inside, rstd, scale, H, D, NORM, RELU)
        dy = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        if PLAIN:
            dy += _load(d_plain_ptr + here, h, d, inside, H, D)
        shrink = tl.full([BLOCK_H], 1.0, tl.float32)  # r
        along = tl.zeros([BLOCK_H], tl.float32)  # of dL/de = r dL/df + along e
        if DOWNSCALE or INFLATION:
            e = _encoded(at, weight_ptr, rays, rope, y, h, d, inside, rstd, scale, row, column, H, D, HALF, NORM,
                         RELU, INVERSE)  # fmt: skip
            y2, e2 = tl.sum(y * y, 1), tl.sum(e * e, 1)
            direct = tl.zeros([BLOCK_H], tl.float32)  # of dL/dy, along y
            if DOWNSCALE:
                shrink = tl.minimum(tl.sqrt(y2 / D + _DOWNSCALE_EPS) / tl.sqrt(e2 / D + _DOWNSCALE_EPS), 1.0)
            grow = tl.zeros([BLOCK_H], tl.float32)  # of dL/df, along f
            if INFLATION:
                least: tl.constexpr = _LEAST_NORM * _LEAST_NORM
                f2 = e2 * shrink * shrink
                d_inflation = tl.load(d_inflation_ptr + token * H + heads, heads < H, 0.0)
                grow = tl.where(f2 > least, 2 * d_inflation / tl.maximum(y2, least), 0.0)
                inflation = tl.maximum(f2, least) / tl.maximum(y2, least)
                direct -= tl.where(y2 > least, 2 * d_inflation * inflation / tl.maximum(y2, least), 0.0)
            along = grow * shrink * shrink
            if DOWNSCALE:
                d_shrink = grow * shrink * e2
                if ENCODED:
                    d_shrink += tl.sum(_load(d_encoded_ptr + here, h, d, inside, H, D) * e, 1)
                d_shrink = tl.where(shrink < 1, d_shrink * shrink, 0.0)
                along -= d_shrink / (e2 + D * _DOWNSCALE_EPS)
                direct += d_shrink / (y2 + D * _DOWNSCALE_EPS)
            dy += (direct[:, None]) * y
        # U^T (r dL/df) + along U^T U y; a rotation's U^T U is the identity
        cos, sin = _turn(rope, d, HALF, D, INVERSE)
        turned = along[:, None] * tl.where(d >= HALF, y, 0.0)
        if ENCODED:
            turned += shrink[:, None] * (
                _load(d_encoded_ptr + here, h, d, inside, H, D) * cos
                - _load(d_encoded_ptr + here, h, d ^ 1, inside, H, D) * sin
            )
        if HALF > 0:
            for j in tl.static_range(4):
                if ENCODED:
                    entry = tl.load(rays + j * row + (d % 4) * column, d < HALF, 0.0)
                    turned += shrink[:, None] * entry * _load(d_encoded_ptr + here, h, d // 4 * 4 + j, inside, H, D)
                if DOWNSCALE or INFLATION:
                    square = tl.zeros([1, BLOCK_D], tl.float32)
                    for i in tl.static_range(4):
                        square += tl.load(rays + i * row + (d % 4) * column, d < HALF, 0.0) * tl.load(
                            rays + i * row + j * column
                        )
                    other = _plain(at, weight_ptr, h, d // 4 * 4 + j, inside, rstd, scale, H, D, NORM, RELU)
                    turned += along[:, None] * square * other
        dy = (dy + turned) * scale
        if RELU:
            dy = tl.where(y * scale > 0, dy, 0.0)
        if NORM:
            x *= rstd
            d_weight += dy * x
            dy *= _load(weight_ptr, h, d, inside, H, D)
            dy = rstd * (dy - x * (tl.sum(dy * x) / (H * D)))
        tl.store(dx_ptr + here + h * D + d, dy.to(dx_ptr.dtype.element_ty), inside)
    if NORM:
        tl.store(d_weight_ptr + tl.program_id(0) * H * D + h * D + d, d_weight, inside)


class Encode(torch.autograd.Function):
    """x (B, N, H, D), weight (H D), float32 matrix (B, N, 4, 4) and rope (N, D / 2 or D / 4, 2); as the definition,
    outputs in x's dtype, the inflation float32. wanted: whether plain and inflation are, which are None otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, matrix: Tensor | None, rope: Tensor, options: tuple, wanted: tuple
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        x, rope = _rows(x), rope.contiguous()
        b, n, h, d = x.shape
        relu, scale, downscale, inverse, eps = options
        plain = x.new_empty(x.shape) if wanted[0] else None
        encoded = x.new_empty(x.shape)
        inflation = torch.empty(b, n, h, device=x.device) if wanted[1] else None
        sizes, flags = _layout(x, weight, matrix, relu, downscale, inverse)
        _forward[b * n,](
            x, weight, matrix if matrix is not None else x, rope, plain, encoded, inflation, x.stride(1), n,
            *_matrix_strides(matrix), scale, eps, *sizes, *flags, *wanted, num_warps=_warps(sizes),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, matrix, rope)
        ctx.options = options
        return encoded, plain, inflation

    @staticmethod
    def backward(ctx: Any, d_encoded: Tensor | None, d_plain: Tensor | None, d_inflation: Tensor | None) -> Any:  # type: ignore[override]
        x, weight, matrix, rope = ctx.saved_tensors
        b, n, h, d = x.shape
        relu, scale, downscale, inverse, eps = ctx.options
        grads = tuple(None if grad is None else grad.contiguous() for grad in (d_plain, d_encoded, d_inflation))
        programs = min(_PROGRAMS, b * n)
        dx = x.new_empty(x.shape)
        parts = None if weight is None else torch.empty(programs, h * d, device=x.device)
        sizes, flags = _layout(x, weight, matrix, relu, downscale, inverse)
        _backward[programs,](
            x, weight, matrix if matrix is not None else x, rope, *grads, dx, parts, x.stride(1), n, b * n,
            *_matrix_strides(matrix), scale, eps, *sizes, *flags, *(grad is not None for grad in grads),
            num_warps=_warps(sizes),
        )  # fmt: skip
        return dx, None if weight is None else parts.sum(0).to(weight.dtype), None, None, None, None  # type: ignore[union-attr]


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


def _layout(
    x: Tensor, weight: Tensor | None, matrix: Tensor | None, relu: bool, downscale: bool, inverse: bool
) -> tuple[tuple, tuple]:
    h, d = x.shape[2:]
    sizes = h, d, d // 2 if matrix is not None else 0, 1 << (h - 1).bit_length(), padded(d)
    return sizes, (weight is not None, relu, downscale, inverse)


def _warps(sizes: tuple) -> int:
    return max(1, min(8, sizes[3] * sizes[4] // 512))

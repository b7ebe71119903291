"""Attention features: normalised, rotated by position, expressed in the coordinates of each token's camera ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.kernels.launch import apply, fused
from longtake.kernels.ucpe import reference


def encode(
    x: Tensor,
    rope: Tensor,
    weight: Tensor | None = None,
    matrix: Tensor | None = None,
    relu: bool = False,
    scale: float = 1.0,
    downscale: bool = False,
    inverse_rope: bool = False,
    plain: bool = False,
    inflation: bool = False,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(encoded, plain, inflation) of projected features, see `reference.encode`; the latter two where they are wanted.

    into: memory that what is encoded is put in, and returned as. Triton computes where `launch.fused` says so, its
    outputs in x's dtype.
    """
    if fused(x):
        from longtake.kernels.ucpe.triton_encode import Encode

        options = (relu, scale, downscale, inverse_rope, reference.EPS)
        matrix = None if matrix is None else _of_clips(matrix, x)
        there = _room(into, x)
        encoded, before, grown = apply(Encode, x, weight, matrix, rope, options, (plain, inflation), there)
        return encoded if into is None or there is not None else into.copy_(encoded), before, grown
    before, encoded = reference.encode(x, rope, weight, matrix, relu, scale, downscale, inverse_rope)
    grown = reference.inflation(before, encoded) if inflation else None
    return encoded if into is None else into.copy_(encoded), before if plain else None, grown


def to_rays(
    branch: Sequence[Tensor],
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor],
    rope: Tensor,
    relu: bool = False,
    scale: float = 1.0,
    downscale: bool = False,
    into: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`encode` of a camera branch's projected queries, keys and values, and the keys' inflation.

    weights: of queries and of keys, which ReLU and, of keys alone, `scale` follow; matrices (B, N, 4, 4): the queries',
    and that of keys and values. into: memory for keys and values.
    """
    q, k, v = branch
    if fused(q, k, v) and not torch.is_grad_enabled():
        from longtake.kernels.ucpe import triton_encode

        rooms = None, _room(into[0], k), _room(into[1], v)
        made = [x.new_empty(x.shape) if room is None else room for x, room in zip(branch, rooms, strict=True)]
        matrices = _of_clips(matrices[0], q), _of_clips(matrices[1], q)
        with torch.cuda.device_of(q):
            grown = triton_encode.to_rays(
                branch, weights, matrices, rope, (relu, scale, downscale, reference.EPS), made
            )
        q, k, v = (x if to is None or x is to else to.copy_(x) for x, to in zip(made, (None, *into), strict=True))
        return q, k, v, grown
    q, *_ = encode(q, rope, weights[0], matrices[0], relu, downscale=downscale)
    k, _, grown = encode(k, rope, weights[1], matrices[1], relu, scale, downscale, inflation=True, into=into[0])
    v, *_ = encode(v, rope, matrix=matrices[1], downscale=downscale, into=into[1])
    assert grown is not None
    return q, k, v, grown


def _of_clips(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix if len(matrix) == len(x) else matrix.expand(len(x), -1, -1, -1).contiguous()


def _room(into: Tensor | None, x: Tensor) -> Tensor | None:
    """`into`, if Triton can put there what becomes of x."""
    return into if into is not None and into.is_contiguous() and into.dtype == x.dtype else None

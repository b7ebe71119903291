"""Attention features: normalised, rotated by position, expressed in the coordinates of each token's camera ray."""

from __future__ import annotations

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
        matrix = matrix if matrix is None or len(matrix) == len(x) else matrix.expand(len(x), -1, -1, -1).contiguous()
        there = into if into is not None and into.is_contiguous() and into.dtype == x.dtype else None
        encoded, before, grown = apply(Encode, x, weight, matrix, rope, options, (plain, inflation), there)
        if there is not None:
            return encoded, before, grown
    else:
        before, encoded = reference.encode(x, rope, weight, matrix, relu, scale, downscale, inverse_rope)
        grown = reference.inflation(before, encoded) if inflation else None
        before = before if plain else None
    return encoded if into is None else into.copy_(encoded), before, grown

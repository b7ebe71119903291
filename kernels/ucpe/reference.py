"""Unified camera positional encoding of attention features: the definition (UCPE, arXiv 2512.07237; SANA-WM section
1.8).

The first half of a head's channels, in groups of 4, is multiplied by the token's 4 x 4 ray matrix; the second half is
rotated by position (RoPE).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.launch import wide

EPS = 1e-5  # of the root mean square over all heads


def rotate(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    """Turn interleaved channel pairs: x (B, N, H, D); rope (N, D / 2, 2), the cosine and sine of each angle.
    float32.
    """
    pairs, rope = wide(x).unflatten(-1, (-1, 2)), rope[:, None]
    if x.is_cpu and not torch.compiler.is_compiling():  # one pass over the pairs; the compiler knows no complex numbers
        turn = torch.view_as_complex(rope)
        return torch.view_as_real(torch.view_as_complex(pairs) * (turn.conj() if inverse else turn)).flatten(-2)
    (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
    sin = -sin if inverse else sin
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def ucpe(x: Tensor, matrix: Tensor, rope: Tensor, inverse_rope: bool = False) -> Tensor:
    """x (B, N, H, D) in any float dtype; matrix (B, N, 4, 4); rope (N, D / 4, 2) as for `rotate`. Returns float32."""
    projected, rotated = wide(x).chunk(2, dim=-1)
    b, n, h, half = projected.shape
    groups = projected.reshape(b, n, h * half // 4, 4) @ matrix.to(projected.dtype).transpose(-1, -2)
    return torch.cat([groups.view(b, n, h, half), rotate(rotated, rope, inverse_rope)], dim=-1)


def downscale_to_rms(reference: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale x (..., D) down, never up, to the root mean square over channels of `reference`."""
    target = (reference.square().mean(-1, keepdim=True) + eps).sqrt()
    found = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (target / found).clamp(max=1)


def encode(
    x: Tensor,
    rope: Tensor,
    weight: Tensor | None = None,
    matrix: Tensor | None = None,
    relu: bool = False,
    scale: float = 1.0,
    downscale: bool = False,
    inverse_rope: bool = False,
) -> tuple[Tensor, Tensor]:
    """From projected features x (B, N, H, D) to what attention compares: (plain, encoded), float32.

    plain: x over its root mean square (of all heads) times `weight` (H D), where one is given; then ReLU, if asked for;
    then times `scale`. encoded: plain rotated by position, or, with the rays' `matrix` (B, N, 4, 4), under UCPE;
    `downscale` as `downscale_to_rms`.
    """
    plain = wide(x)
    if weight is not None:
        plain = F.rms_norm(plain.flatten(2), (weight.numel(),), wide(weight), EPS).view(x.shape)
    plain = (plain.relu() if relu else plain) * scale
    encoded = rotate(plain, rope, inverse_rope) if matrix is None else ucpe(plain, matrix, rope, inverse_rope)
    return plain, downscale_to_rms(plain, encoded) if downscale else encoded


def inflation(plain: Tensor, encoded: Tensor) -> Tensor:
    """Squared growth of each feature's norm under UCPE: (B, N, H)."""
    before, after = (tensor.norm(dim=-1).clamp(min=1e-6) for tensor in (plain, encoded))
    return (after / before).square()

"""Unified camera positional encoding of attention features: the definition (UCPE, arXiv 2512.07237; SANA-WM section
1.8).

The first half of a head's channels, in groups of 4, is multiplied by the token's 4 x 4 ray matrix; the second half is
rotated by position (RoPE).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    """Turn interleaved channel pairs: x (B, N, H, D); rope (N, D / 2, 2), the cosine and sine of each angle.
    float32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)
    sin = -sin if inverse else sin
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def ucpe(x: Tensor, matrix: Tensor, rope: Tensor, inverse_rope: bool = False) -> Tensor:
    """x (B, N, H, D) in any float dtype; matrix (B, N, 4, 4); rope (N, D / 4, 2) as for `rotate`. Returns float32."""
    projected, rotated = x.float().chunk(2, dim=-1)
    b, n, h, half = projected.shape
    groups = projected.reshape(b, n, h * half // 4, 4) @ matrix.float().transpose(-1, -2)
    return torch.cat([groups.view(b, n, h, half), rotate(rotated, rope, inverse_rope)], dim=-1)


def downscale_to_rms(reference: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale x (..., D) down, never up, to the root mean square over channels of `reference`."""
    target = (reference.square().mean(-1, keepdim=True) + eps).sqrt()
    found = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (target / found).clamp(max=1)

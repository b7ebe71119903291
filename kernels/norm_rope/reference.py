"""Queries and keys in their places: the definition (LTX-2's attention)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.launch import wide

EPS = 1e-6  # of the mean square over all heads

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (N, H, D / 2) float32


def norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """q and k (B, N, H, D), each over its root mean square of all heads, times its weight (H D), and rotated; in their
    dtype, rounded once.
    """
    q, k = (
        turned(F.rms_norm(wide(x).flatten(2), w.shape, wide(w), EPS).view(x.shape), rotation).to(x.dtype)
        for x, w in ((q, q_weight), (k, k_weight))
    )
    return q, k


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, N, H, D), the two halves of each head turned as pairs."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

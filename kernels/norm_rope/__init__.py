"""Queries and keys in their places: normed over all heads, and the halves of each head turned."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.launch import fused
from longtake.kernels.norm_rope import reference
from longtake.kernels.norm_rope.reference import Rotation, turned

__all__ = ["Rotation", "norm_rope", "turned"]


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Rotation, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rope`; k is put into `room` (B, N, H, D), if that is given, and then is it. Triton computes
    it where `launch.fused` says so and nobody wants a gradient.
    """
    if fused(q, k) and not torch.is_grad_enabled():
        from longtake.kernels.norm_rope import triton_norm_rope

        with torch.cuda.device_of(q):
            return triton_norm_rope.norm_rope(q, k, q_weight, k_weight, rotation, room)
    q, k = reference.norm_rope(q, k, q_weight, k_weight, rotation)
    return q, k if room is None else room.copy_(k)

"""Queries and keys in their places: normed over all heads, and the halves of each head turned."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.launch import fused
from longtake.kernels.norm_rope import reference
from longtake.kernels.norm_rope.reference import Rotation, turned

__all__ = ["Rotation", "norm_rope", "turned"]


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Rotation,
    room: tuple[Tensor, Tensor] | None = None, v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.norm_rope`; with room (B, N, H, D) for keys and values, k and v are put there. Triton computes it
    where `launch.fused` says so and nobody wants a gradient.
    """
    assert (room is None) == (v is None), "values go where there is room, and only there"
    if fused(q, k) and not torch.is_grad_enabled():
        from longtake.kernels.norm_rope import triton_norm_rope

        with torch.cuda.device_of(q):
            return triton_norm_rope.norm_rope(q, k, q_weight, k_weight, rotation, room, v)
    q, k = reference.norm_rope(q, k, q_weight, k_weight, rotation)
    if room is None or v is None:  # neither
        return q, k
    room[1].copy_(v)
    return q, room[0].copy_(k)

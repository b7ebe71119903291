"""Softmax attention of many queries to a few keys, some of which may not be seen, in Triton, forward only: a program
takes a tile of one head's queries past all keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.launch import padded, roomy

_QUERIES, _KEYS, _WARPS = 64, 64, 4


@triton.jit
def _masked(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, queries, keys, q_clip, q_token, k_clip, k_token, k_head, v_clip, v_token,
    v_head, scale, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale is in powers of 2."""
    clip, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    n, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    inside = (n < queries)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + clip * q_clip + n[:, None] * q_token + head * D + d[None, :], inside, 0.0)
    k_ptr += clip * k_clip + head * k_head
    v_ptr += clip * v_clip + head * v_head
    top, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        known = (m < keys)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + m[:, None] * k_token + d[None, :], known, 0.0)
        v = tl.load(v_ptr + m[:, None] * v_token + d[None, :], known, 0.0)
        added = tl.load(mask_ptr + clip * keys + m, m < keys, float("-inf")).to(tl.float32)
        scores = tl.dot(q, tl.trans(k)) * scale + added[None, :] * 1.4426950408889634
        higher = tl.maximum(top, tl.max(scores, 1))
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # no key of these is seen, so far
        weights, shrink = tl.exp2(scores - reached[:, None]), tl.exp2(top - reached)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        total, top = total * shrink + tl.sum(weights, 1), higher
    to = out_ptr + (clip * queries + n[:, None]) * HEADS * D + head * D + d[None, :]
    tl.store(to, (out / total[:, None]).to(out_ptr.dtype.element_ty), inside)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """As the definition; q (B, N, H, D) with a token's channels together, k and v (B, M, H, D) of q's dtype."""
    b, n, h, d = q.shape
    q = q if q.stride(3) == 1 and q.stride(2) == d else q.contiguous()
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)
    _masked[triton.cdiv(n, _QUERIES), b * h](
        q, k, v, mask.contiguous(), out, n, k.shape[1], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        scale * math.log2(math.e), d, h, _QUERIES, _KEYS, padded(d), num_warps=_WARPS,
        num_stages=3 if roomy(q) else 2,
    )  # fmt: skip
    return out

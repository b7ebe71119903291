"""Softmax attention of many queries to a few keys, some of which may not be seen, in Triton, forward only: a program
takes a tile of one head's queries past all keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longtake.kernels.launch import aligned, padded

_QUERIES, _KEYS, _WARPS, _STAGES = 64, 64, 4, 3


@triton.jit
def _masked(
    q_ref, k_ref, v_ref, mask_ptr, out_ptr, queries, keys, scale, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """By descriptors of q, k and v, tiles of which come without a thread's work; scale is in powers of 2."""
    clip, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    start = tl.program_id(0) * BLOCK_Q
    q = q_ref.load([clip, start, head, 0]).reshape(BLOCK_Q, BLOCK_D)
    top, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        added = tl.load(mask_ptr + clip * keys + m, m < keys, float("-inf")).to(tl.float32)
        k = k_ref.load([clip, first, head, 0]).reshape(BLOCK_K, BLOCK_D)
        v = v_ref.load([clip, first, head, 0]).reshape(BLOCK_K, BLOCK_D)
        scores = tl.dot(q, tl.trans(k)) * scale + added[None, :] * 1.4426950408889634
        higher = tl.maximum(top, tl.max(scores, 1))
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # no key of these is seen, so far
        weights, shrink = tl.exp2(scores - reached[:, None]), tl.exp2(top - reached)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        total, top = total * shrink + tl.sum(weights, 1), higher
    n, d = start + tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_D)[None, :]
    to = out_ptr + ((clip.to(tl.int64) * queries + n) * HEADS + head) * D + d
    tl.store(to, (out / total[:, None]).to(out_ptr.dtype.element_ty), (n < queries) & (d < D))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """As the definition; q (B, N, H, D), k and v (B, M, H, D) of its dtype."""
    b, n, h, d = q.shape
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)
    refs = [
        TensorDescriptor.from_tensor(aligned(x), [1, block, 1, padded(d)])
        for x, block in ((q, _QUERIES), (k, _KEYS), (v, _KEYS))
    ]
    _masked[triton.cdiv(n, _QUERIES), b * h](
        *refs, mask.contiguous(), out, n, k.shape[1], scale * math.log2(math.e), d, h, _QUERIES, _KEYS, padded(d),
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out

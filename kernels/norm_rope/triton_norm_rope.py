"""`norm_rope` in Triton, forward only: a program is a token, whose angles are as large as both its query and its key,
and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.norm_rope.reference import EPS, Rotation


@triton.jit
def _turned(x_ptr, weight_ptr, to_ptr, first, second, inside, cos, sin, size, eps):
    a = tl.load(x_ptr + first, inside, 0.0).to(tl.float32)
    b = tl.load(x_ptr + second, inside, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(a * a + b * b) / size + eps)
    a *= factor * tl.load(weight_ptr + first, inside, 0.0).to(tl.float32)
    b *= factor * tl.load(weight_ptr + second, inside, 0.0).to(tl.float32)
    tl.store(to_ptr + first, (a * cos - b * sin).to(to_ptr.dtype.element_ty), inside)
    tl.store(to_ptr + second, (b * cos + a * sin).to(to_ptr.dtype.element_ty), inside)


@triton.jit
def _norm_rope(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_to_ptr, k_to_ptr, v_to_ptr, tokens, q_clip,
    q_token, k_clip, k_token, v_clip, v_token, to_clip, to_token, eps, PAIRS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < PAIRS
    first = pair // HALF * 2 * HALF + pair % HALF
    second = first + HALF
    cos = tl.load(cos_ptr + token * PAIRS + pair, inside, 0.0)
    sin = tl.load(sin_ptr + token * PAIRS + pair, inside, 0.0)
    _turned(q_ptr + clip * q_clip + token * q_token, q_weight_ptr, q_to_ptr + (clip * tokens + token) * 2 * PAIRS,
            first, second, inside, cos, sin, 2 * PAIRS, eps)  # fmt: skip
    _turned(k_ptr + clip * k_clip + token * k_token, k_weight_ptr, k_to_ptr + clip * to_clip + token * to_token,
            first, second, inside, cos, sin, 2 * PAIRS, eps)  # fmt: skip
    if v_ptr is not None:
        from_v, to_v = v_ptr + clip * v_clip + token * v_token, v_to_ptr + clip * to_clip + token * to_token
        tl.store(to_v + pair, tl.load(from_v + pair, inside), inside)
        tl.store(to_v + PAIRS + pair, tl.load(from_v + PAIRS + pair, inside), inside)


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: Rotation,
    room: tuple[Tensor, Tensor] | None,
    v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the definition; with room k and v there, whose tokens may lie apart."""
    q, k = (x if _by_token(x) else x.contiguous() for x in (q, k))
    v = v if v is None or _by_token(v) else v.contiguous()
    (b, n, h, d), (cos, sin) = q.shape, (x.contiguous() for x in rotation)
    q_to = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_to, v_to = (torch.empty(k.shape, dtype=k.dtype, device=k.device), None) if room is None else room
    assert _by_token(k_to) and (v_to is None or v_to.stride() == k_to.stride())
    pairs = h * d // 2
    _norm_rope[n, b](
        q, k, v, q_weight, k_weight, cos, sin, q_to, k_to, v_to, n, *q.stride()[:2], *k.stride()[:2],
        *(q if v is None else v).stride()[:2], *k_to.stride()[:2], EPS, pairs, d // 2, triton.next_power_of_2(pairs),
        num_warps=4,
    )  # fmt: skip
    return q_to, k_to


def _by_token(x: Tensor) -> bool:
    """Whether the channels of a token lie together."""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]

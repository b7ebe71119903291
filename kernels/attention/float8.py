"""Softmax attention of factors in float8_e4m3fn, which have 3 bits of mantissa: an approximation, and faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.float8.reference import rounded

_TOKENS = 16  # of values, that their number is filled up to a multiple of


def quantized(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q (B, N, H, D), k and v (B, M, H, D): q (B, H, N, D), k (B, H, M, D) and v (B, H, D, M + padding) in float8;
    the scales of the scores q k^T (B, H) and of v (B, H, D).

    The keys' mean is taken off them, which adds one number to all scores of a query: softmax does not see it (after
    SageAttention, arXiv 2410.02367).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k = k - k.mean(2, keepdim=True, dtype=torch.float32).to(k.dtype)
    v = F.pad(v.transpose(2, 3), (0, -v.shape[2] % _TOKENS))
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = rounded(q, (2, 3)), rounded(k, (2, 3)), rounded(v, (3,))
    return q8, k8, v8, (q_scale * k_scale).flatten(2), v_scale.flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v with these factors, (B, N, H, D) in q's dtype: the definition. Weights stay as they are,
    where a kernel rounds them too.
    """
    tokens = v.shape[1]
    q8, k8, v8, scales, v_scales = quantized(q, k, v)
    values = v8[..., :tokens].float().transpose(2, 3) * v_scales[:, :, None]
    out = F.scaled_dot_product_attention(q8.float() * scales[..., None], k8.float(), values, scale=scale)
    return out.transpose(1, 2).to(q.dtype)

"""`gates` in Triton, forward only: a program is a head in a frame, which torch would make a dozen launches of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.launch import even_rows


@triton.jit
def _gates(
    projected_ptr, dt_bias_ptr, a_log_ptr, inflation_ptr, beta_ptr, decay_ptr, camera_ptr, row, tokens, heads,
    BLOCK: tl.constexpr,
):  # fmt: skip
    frame, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    grown = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tokens, BLOCK):
        inside = first + s < tokens
        token = frame * tokens + first + s
        total += tl.load(projected_ptr + token * row + heads + head, inside, 0.0).to(tl.float32)
        if inflation_ptr is not None:
            grown += tl.load(inflation_ptr + token * heads + head, inside, 0.0)
    step = tl.sum(total) / tokens + tl.load(dt_bias_ptr + head).to(tl.float32)
    step = tl.where(step > 20, step, tl.log(1 + tl.exp(step)))
    decay = tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * step)
    tl.store(decay_ptr + frame * heads + head, decay)
    discount = tl.maximum(tl.sum(grown) / tokens, 1.0)
    for first in range(0, tokens, BLOCK):
        inside = first + s < tokens
        token = frame * tokens + first + s
        beta = tl.sigmoid(tl.load(projected_ptr + token * row + head, inside, 0.0).to(tl.float32))
        tl.store(beta_ptr + token * heads + head, beta, inside)
        if inflation_ptr is not None:
            tl.store(camera_ptr + token * heads + head, beta / discount, inside)


def gates(
    projected: Tensor, frames: int, dt_bias: Tensor, a_log: Tensor, inflation: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the definition."""
    b, n, heads = len(projected), projected.shape[1], projected.shape[2] // 2
    beta = torch.empty(b, frames, n // frames, heads, device=projected.device)
    decay = torch.empty(b, frames, heads, device=projected.device)
    camera = None if inflation is None else torch.empty_like(beta)
    inflation = None if inflation is None else inflation.contiguous()
    projected = even_rows(projected)
    _gates[b * frames, heads](
        projected, dt_bias, a_log, inflation, beta, decay, camera, projected.stride(1), n // frames, heads, 1024,
        num_warps=4,
    )  # fmt: skip
    return beta, decay, camera

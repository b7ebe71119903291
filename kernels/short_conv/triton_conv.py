"""`short_conv` in Triton. A symmetric kernel is its own transpose, so the gradient of x is the convolution of y's."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.launch import contiguous_tokens

_BLOCK = 1024
_TOKENS, _CHANNELS, _PROGRAMS = 32, 64, 64  # of the weight's gradient: a tile, and programs a block of channels


@triton.jit
def _convolve(x_ptr, weight_ptr, y_ptr, x_token, frames, tokens, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) % frames  # neighbours in time run together and find their frames in cache
    first = tl.program_id(0).to(tl.int64) * tokens
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s, c = at // C, at % C
    inside = s < tokens
    here = x_ptr + (first + s) * x_token + c
    frame = tokens * x_token
    y = tl.load(weight_ptr + c * K + K - 1).to(tl.float32) * tl.load(here, inside, 0.0).to(tl.float32)
    for j in tl.static_range(1, K):
        before = tl.load(here - j * frame, inside & (t >= j), 0.0).to(tl.float32)
        after = tl.load(here + j * frame, inside & (t + j < frames), 0.0).to(tl.float32)
        y += tl.load(weight_ptr + c * K + K - 1 - j).to(tl.float32) * (before + after)
    tl.store(y_ptr + (first + s) * C + c, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _weight_gradient(
    x_ptr, grad_ptr, out_ptr, x_token, frames, tokens, all_tokens, C: tl.constexpr, K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over this program's tokens, tap by tap: out (programs, K, C)."""
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    for j in tl.static_range(K):
        total = tl.zeros([BLOCK_C], tl.float32)
        for start in range(tl.program_id(0) * BLOCK_S, all_tokens, tl.num_programs(0) * BLOCK_S):
            token = (tl.cast(start, tl.int64) + tl.arange(0, BLOCK_S))[:, None]
            inside = (token < all_tokens) & (c < C)
            t = token // tokens % frames
            grad = tl.load(grad_ptr + token * C + c, inside, 0.0).to(tl.float32)
            here = x_ptr + token * x_token + c
            x = tl.load(here - j * tokens * x_token, inside & (t >= j), 0.0).to(tl.float32)
            if j > 0:
                x += tl.load(here + j * tokens * x_token, inside & (t + j < frames), 0.0).to(tl.float32)
            total += tl.sum(grad * x, 0)
        to = out_ptr + (tl.program_id(0) * K + K - 1 - j) * C + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(to, total, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C) < C)


class ShortConv(torch.autograd.Function):
    """x (B, T, S, C), weight (C, 1, K); y in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = contiguous_tokens(x), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        b, t, s, c = x.shape
        k = weight.shape[-1]
        programs = min(_PROGRAMS, triton.cdiv(b * t * s, _TOKENS))
        parts = torch.empty(programs, k, c, device=x.device)
        _weight_gradient[programs, triton.cdiv(c, _CHANNELS)](
            x, grad, parts, x.stride(2), t, s, b * t * s, c, k, _TOKENS, _CHANNELS
        )
        return _convolved(grad, weight), parts.sum(0).T[:, None].to(weight.dtype)


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    b, t, s, c = x.shape
    y = x.new_empty(x.shape)
    _convolve[b * t, triton.cdiv(s * c, _BLOCK)](x, weight, y, x.stride(2), t, s, c, weight.shape[-1], _BLOCK)
    return y

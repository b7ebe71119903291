"""`short_conv` in Triton. A symmetric kernel is its own transpose, so the gradient of x is the convolution of y's.

A program computes some frames of a block of channels, for one strip of tokens after another. It loads every frame that
it needs once, each a member of a tuple; those beyond its own are its neighbours' too and come out of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.launch import contiguous_tokens

_FRAMES, _TOKENS, _CHANNELS, _WARPS = 7, 8, 64, 4  # a tile; 4 channels a thread
_PROGRAMS, _PROGRAMS_BACKWARD = 110, 32  # for the same frames and channels; they share the strips of tokens


@triton.jit
def _convolve(
    x_ptr, before_ptr, taps_ptr, y_ptr, by_ptr, parts_ptr, x_token, by_token, frames, tokens, C: tl.constexpr,
    K: tl.constexpr, FRAMES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """y (B, T, S, C) from x, the K - 1 frames before it, or zeros, and taps (K, C), the present frame's last.

    Backwards, where x is the gradient of y and y that of x, also this program's part (K, C) of the taps' gradient: sums
    of `by`, the input, times what met a tap.
    """
    reach: tl.constexpr = K - 1
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, TOKENS)[:, None]
    chunks = tl.cdiv(frames, FRAMES)
    start = tl.program_id(1) % chunks * FRAMES
    clip = (tl.program_id(1) // chunks).to(tl.int64)
    at = clip * frames + start  # that frame among those of all clips
    taps, parts = (), (tl.zeros([TOKENS, BLOCK_C], tl.float32),) * K
    for j in tl.static_range(K):
        taps += (tl.load(taps_ptr + (reach - j) * C + c, c < C, 0.0).to(tl.float32)[None, :],)
    for first in range(tl.program_id(2) * TOKENS, tokens, tl.num_programs(2) * TOKENS):
        inside = (first + row < tokens) & (c < C)
        x_at = x_ptr + ((at - reach) * tokens + first) * x_token + row * x_token + c
        y_at = y_ptr + (at * tokens + first) * C + row * C + c
        by_at = by_ptr + (at * tokens + first) * by_token + row * by_token + c
        window = ()
        for i in tl.static_range(FRAMES + 2 * reach):
            t = start + i - reach
            x = tl.load(x_at, (t >= 0) & (t < frames) & inside, 0.0).to(tl.float32)
            if before_ptr is not None and i < reach:
                from_before = before_ptr + ((clip * reach + t + reach) * tokens + first) * C + row * C + c
                x += tl.load(from_before, (t < 0) & inside, 0.0).to(tl.float32)
            window += (x,)
            x_at += tokens * x_token
        for i in tl.static_range(FRAMES):
            known = (start + i < frames) & inside
            pairs = (window[i + reach],)
            y = taps[0] * pairs[0]
            for j in tl.static_range(1, K):
                pairs += (window[i + reach - j] + window[i + reach + j],)
                y += taps[j] * pairs[j]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), known)
            y_at += tokens * C
            if BACKWARD:
                by = tl.load(by_at, known, 0.0).to(tl.float32)
                by_at += tokens * by_token
                grown = ()
                for j in tl.static_range(K):
                    grown += (parts[j] + by * pairs[j],)
                parts = grown
    if BACKWARD:
        program = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        for j in tl.static_range(K):
            tl.store(parts_ptr + (program * K + reach - j) * C + c, tl.sum(parts[j], 0), c < C)


class ShortConv(torch.autograd.Function):
    """x (B, T, S, C), weight (C, 1, K), before (B, K - 1, S, C), which gets no gradient; y in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
        x, taps = contiguous_tokens(x), weight[:, 0].to(x.dtype).T.contiguous()
        ctx.save_for_backward(x, taps)
        ctx.weight_dtype = weight.dtype
        return _launch(x, taps, before=before)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, taps = ctx.saved_tensors
        dx, parts = _launch(grad.contiguous(), taps, x)
        return dx, parts.sum(0).T[:, None].to(ctx.weight_dtype), None


def _launch(x: Tensor, taps: Tensor, by: Tensor | None = None, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x after `before` convolved; with `by`, also the parts (programs, K, C) of the taps' gradient."""
    (b, t, s, c), k = x.shape, len(taps)
    backward = by is not None
    frames = min(_FRAMES, t)
    clips = b * triton.cdiv(t, frames)
    programs = min(_PROGRAMS_BACKWARD if backward else _PROGRAMS, triton.cdiv(s, _TOKENS))
    y = x.new_empty(x.shape)
    parts = torch.empty(clips * programs if backward else 0, k, c, device=x.device)
    by, before = x if by is None else by, None if before is None else before.contiguous()
    _convolve[triton.cdiv(c, _CHANNELS), clips, programs](
        x, before, taps, y, by, parts, x.stride(2), by.stride(2), t, s, c, k, frames, _TOKENS, _CHANNELS, backward,
        num_warps=_WARPS,
    )  # fmt: skip
    return y, parts

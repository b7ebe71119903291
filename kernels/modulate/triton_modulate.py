"""`modulate` in Triton: each token is read once and written once, also backwards.

The C channels of a token are HEAD ones, a power of 2, and at most TAIL others: one tile of all would be almost half
empty. Forwards a program is a token of one warp. Backwards it walks over tokens of one frame and leaves its part of the
gradients of shift and scale; torch adds the parts, so they are the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_PROGRAMS = 528  # backwards, at most, unless there are more frames: 4 a multiprocessor of an H100
_CHANNELS_OF_WARP = 512


@triton.jit
def load(ptr, at, inside):
    return tl.load(ptr + at, inside, 0.0).to(tl.float32)


@triton.jit
def store(ptr, at, value, inside):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), inside)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _modulate(
    x_ptr, y_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr, mean_ptr, rstd_ptr, tokens, shift_row, scale_row, eps,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """out, and the statistics that the backward pass needs: mean and 1 / standard deviation, float32. With y, of x + y,
    which is stored too, and the statistics are not.
    """
    number = tl.program_id(0)
    token, frame = number.to(tl.int64), (number // tokens).to(tl.int64)
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    whole, part = head < C, tail < C
    shift_ptr += frame * shift_row
    scale_ptr += frame * scale_row
    h, t = load(x_ptr + token * C, head, whole), load(x_ptr + token * C, tail, part)
    if y_ptr is not None:
        h, t = h + load(y_ptr + token * C, head, whole), t + load(y_ptr + token * C, tail, part)
        store(sum_ptr + token * C, head, h, whole)
        store(sum_ptr + token * C, tail, t, part)
    mean = (tl.sum(h) + tl.sum(t)) / C
    h, t = h - mean, tl.where(part, t - mean, 0.0)
    rstd = tl.rsqrt((tl.sum(h * h) + tl.sum(t * t)) / C + eps)
    h *= rstd * (1 + load(scale_ptr, head, whole))
    t *= rstd * (1 + load(scale_ptr, tail, part))
    store(out_ptr + token * C, head, h + load(shift_ptr, head, whole), whole)
    store(out_ptr + token * C, tail, t + load(shift_ptr, tail, part), part)
    if y_ptr is None:
        tl.store(mean_ptr + token, mean)
        tl.store(rstd_ptr + token, rstd)


@triton.jit
def _modulate_backward(
    x_ptr, scale_ptr, mean_ptr, rstd_ptr, grad_ptr, dx_ptr, sums_ptr, tokens, stretch, scale_row, C: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dx, and of this program's tokens the gradients (2, C) of shift and scale, unless sums_ptr is None."""
    first, frame = tl.program_id(0) * stretch, tl.program_id(1).to(tl.int64)
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    whole, part = head < C, tail < C
    scale_ptr += frame * scale_row
    shift_h, shift_t = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    scale_h, scale_t = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    for number in range(first, tl.minimum(first + stretch, tokens)):
        token = frame * tokens + number
        h, t = load(x_ptr + token * C, head, whole), load(x_ptr + token * C, tail, part)
        grad_h, grad_t = load(grad_ptr + token * C, head, whole), load(grad_ptr + token * C, tail, part)
        mean, rstd = tl.load(mean_ptr + token), tl.load(rstd_ptr + token)
        h, t = (h - mean) * rstd, (t - mean) * rstd  # the part outside meets gradients that are 0
        if sums_ptr is not None:
            shift_h += grad_h
            shift_t += grad_t
            scale_h += grad_h * h
            scale_t += grad_t * t
        grad_h *= 1 + load(scale_ptr, head, whole)
        grad_t *= 1 + load(scale_ptr, tail, part)
        one_h, x_h = tl.reduce((grad_h, grad_h * h), 0, _add)
        one_t, x_t = tl.reduce((grad_t, grad_t * t), 0, _add)
        along_1, along_x = (one_h + one_t) / C, (x_h + x_t) / C
        store(dx_ptr + token * C, head, rstd * (grad_h - along_1 - h * along_x), whole)
        store(dx_ptr + token * C, tail, rstd * (grad_t - along_1 - t * along_x), part)
    if sums_ptr is not None:
        sums_ptr += (frame * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        tl.store(sums_ptr + head, shift_h, whole)
        tl.store(sums_ptr + tail, shift_t, part)
        tl.store(sums_ptr + C + head, scale_h, whole)
        tl.store(sums_ptr + C + tail, scale_t, part)


class Modulate(torch.autograd.Function):
    """As the definition; each gradient in its input's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        x, shift_rows, scale_rows = x.contiguous(), frame_rows(shift), frame_rows(scale)
        b, n, c = x.shape
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, scale.dtype))
        mean, rstd = torch.empty(2, b, n, device=x.device)
        _modulate[b * n,](
            x, None, shift_rows, scale_rows, None, out, mean, rstd, n // shift.shape[1], shift_rows.stride(0),
            scale_rows.stride(0), eps, c, *_halves(c), num_warps=_warps(c),
        )  # fmt: skip
        ctx.save_for_backward(x, scale_rows, mean, rstd)
        ctx.shape, ctx.dtypes = shift.shape, (shift.dtype, scale.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, mean, rstd = ctx.saved_tensors
        c, frames, dx = x.shape[2], len(scale), torch.empty_like(x)
        tokens = x.shape[1] // ctx.shape[1]
        stretch = triton.cdiv(tokens, max(1, _PROGRAMS // frames))
        programs = triton.cdiv(tokens, stretch)
        wanted = any(ctx.needs_input_grad[1:3])
        sums = torch.empty(frames, programs, 2, c, device=x.device) if wanted else None
        _modulate_backward[programs, frames](
            x, scale, mean, rstd, grad.contiguous(), dx, sums, tokens, stretch, scale.stride(0), c, *_halves(c),
            num_warps=_warps(c),
        )  # fmt: skip
        if sums is None:
            return dx, None, None, None
        rows = zip(sums.sum(1).unbind(1), ctx.dtypes, strict=True)
        return dx, *(row.view(ctx.shape).to(dtype) for row, dtype in rows), None


def add_and_modulate(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the definition, for who wants no gradient."""
    x, y, shift_rows, scale_rows = x.contiguous(), y.contiguous(), frame_rows(shift), frame_rows(scale)
    b, n, c = x.shape
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    out = torch.empty_like(x, dtype=torch.promote_types(total.dtype, scale.dtype))
    _modulate[b * n,](
        x, y, shift_rows, scale_rows, total, out, None, None, n // shift.shape[1], shift_rows.stride(0),
        scale_rows.stride(0), eps, c, *_halves(c), num_warps=_warps(c),
    )  # fmt: skip
    return total, out


def frame_rows(modulation: Tensor) -> Tensor:
    """(B, T, 1, C) as rows (B T, C), each with its channels together; no copy of a chunk of a (B, T, 6, C) tensor."""
    rows = modulation.flatten(0, 2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _halves(channels: int) -> tuple[int, int]:
    """HEAD < C, and TAIL."""
    head = triton.next_power_of_2(channels) // 2
    return head, triton.next_power_of_2(channels - head)


def _warps(channels: int) -> int:
    return max(1, min(8, _halves(channels)[0] // _CHANNELS_OF_WARP))

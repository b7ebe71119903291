"""Softmax attention by whichever exact implementation is fastest here, found out by trying: torch's three, and ours for
Hopper.

Which one wins depends on device, length and head size. Nothing is approximated but by `attend_float8`; they differ in
the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake.kernels.attention import float8
from longtake.kernels.launch import fused, gpu_alone, uncompiled

_HEAD_START = 10_000_000  # cycles that a GPU waits, while the CPU issues the calls that are timed: these may be short
_LEAST_WORK = 1 << 33  # multiplications below which torch's own choice is not worth questioning


def _through(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return _scaled_dot_product(q, k, v, scale)

    return attend


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _hopper(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if torch.cuda.get_device_capability(q.device)[0] != 9 or _gradient_wanted(q, k, v):
        raise RuntimeError("made for compute capability 9, and for no gradient")
    from longtake.kernels.attention import triton_hopper

    return triton_hopper.attend(q, k, v, scale)


_BACKENDS = {
    "hopper": _hopper,
    "cudnn": _through(SDPBackend.CUDNN_ATTENTION),
    "flash": _through(SDPBackend.FLASH_ATTENTION),
    "efficient": _through(SDPBackend.EFFICIENT_ATTENTION),
}


@dataclass(frozen=True)
class Choice:
    """The backend for a shape, and the milliseconds of all that could compute it."""

    backend: str
    milliseconds: dict[str, float]


_choices: dict[tuple, Choice] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v: (B, N, H, D) each, of one dtype.

    The first large call of a shape in 16 bits on a GPU times the backends, with the backward pass where gradients are
    wanted.
    """
    if not q.is_cuda or q.element_size() > 2 or q.numel() * k.shape[1] < _LEAST_WORK:
        return _scaled_dot_product(q, k, v, scale)
    return _by_the_fastest(q, k, v, scale)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(q k^T scale + mask) v: q (B, N, H, D), k and v (B, M, H, D), mask (B, M), all of one dtype. Of few keys,
    16 bits and no gradient Triton is faster than torch.
    """
    if fused(q, k) and q.element_size() == 2 and q.shape[-1] in range(8, 129, 8) and not torch.is_grad_enabled():
        from longtake.kernels.attention import triton_masked

        with torch.cuda.device_of(q):
            return triton_masked.attend(q, k, v, scale, mask)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], scale=scale).transpose(1, 2)


def attend_float8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """About `attend`, to some 5 percent of its norm: factors rounded to float8_e4m3fn, see `float8`. On Hopper, where D
    allows it, at their speed. ValueError where a gradient is wanted.
    """
    if _gradient_wanted(q, k, v):
        raise ValueError("attention in float8 has no gradient: train with softmax_dtype bfloat16")
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.shape[-1] in range(16, 129, 16):
        from longtake.kernels.attention import triton_hopper

        with torch.cuda.device_of(q):
            return triton_hopper.attend_fp8(q, k, v, scale)
    return float8.attend(q, k, v, scale)


def _gradient_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fastest(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with torch.cuda.device_of(q):
        return _BACKENDS[choose(q, k, v, scale).backend](q, k, v, scale)


# So large an attention gains nothing from what is compiled around it.
_by_the_fastest = uncompiled(_fastest)


def choose(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Choice:
    """The fastest backend for (B, N, H, D) of this shape, dtype and device, timed once a process.

    RuntimeError when none can compute it.
    """
    backward = _gradient_wanted(q, k, v)
    key = (q.shape, k.shape, q.dtype, q.device, backward)
    if key not in _choices:
        inputs = [tensor.detach().requires_grad_(backward) for tensor in (q, k, v)]
        times = {name: _milliseconds(name, inputs, scale, backward) for name in _BACKENDS}
        known = {name: time for name, time in times.items() if time is not None}
        if not known:
            raise RuntimeError(f"no attention takes {tuple(q.shape)} of {q.dtype} on {q.device}")
        _choices[key] = Choice(min(known, key=known.__getitem__), known)
    return _choices[key]


def _milliseconds(name: str, inputs: list[Tensor], scale: float, backward: bool) -> float | None:
    """Of the faster of two calls after a first one, or None where the backend refuses.

    In a thread of its own, out of sight of activation checkpointing, which counts what its thread computes and saves.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_timed, name, inputs, scale, backward).result()


def _timed(name: str, inputs: list[Tensor], scale: float, backward: bool) -> float | None:
    with gpu_alone, torch.cuda.device(inputs[0].device), torch.set_grad_enabled(backward):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        try:
            for number, event in enumerate(events):
                if number == 1:
                    torch.cuda._sleep(_HEAD_START)
                event.record()
                out = _BACKENDS[name](*inputs, scale)
                if backward:
                    torch.autograd.grad(out, inputs, out)
        except Exception:  # a shape, a device or a Triton that it was not made for, or no memory
            return None
        torch.cuda.synchronize()
        return min(begin.elapsed_time(end) for begin, end in zip(events[1:], events[2:], strict=False))

"""Softmax attention by whichever of torch's exact implementations is fastest here, found out by trying.

Which one wins depends on device, length and head size. Nothing is approximated; they differ in the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LEAST_WORK = 1 << 36  # multiplications below which torch's own choice is not worth questioning


@dataclass(frozen=True)
class Choice:
    """The backend for a shape, and the milliseconds of all that could compute it."""

    backend: str
    milliseconds: dict[str, float]


_choices: dict[tuple, Choice] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v: (B, N, H, D) each, of one dtype.

    The first large call of a shape on a GPU times the backends, with the backward pass where gradients are wanted.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if not q.is_cuda or q.numel() * k.shape[2] < _LEAST_WORK:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return _by_the_fastest(q, k, v, scale).transpose(1, 2)


def _fastest(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(_BACKENDS[choose(q, k, v, scale).backend]):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


# So large an attention gains nothing from what is compiled around it.
_by_the_fastest: Any = torch.compiler.disable(_fastest)


def choose(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Choice:
    """The fastest backend for (B, H, N, D) of this shape, dtype and device, timed once a process.

    RuntimeError when none can compute it.
    """
    backward = torch.is_grad_enabled() and q.requires_grad
    key = (q.shape, k.shape, q.dtype, q.device, backward)
    if key not in _choices:
        inputs = [tensor.detach().requires_grad_(backward) for tensor in (q, k, v)]
        times = {name: _milliseconds(name, inputs, scale, backward) for name in _BACKENDS}
        known = {name: time for name, time in times.items() if time is not None}
        if not known:
            raise RuntimeError(f"no attention of torch's takes {tuple(q.shape)} of {q.dtype} on {q.device}")
        _choices[key] = Choice(min(known, key=known.__getitem__), known)
    return _choices[key]


def _milliseconds(name: str, inputs: list[Tensor], scale: float, backward: bool) -> float | None:
    """Of the second of two calls, or None where the backend refuses."""
    q, k, v = inputs
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with sdpa_kernel(_BACKENDS[name]), torch.set_grad_enabled(backward):
            for _ in range(2):
                begin.record()
                out = F.scaled_dot_product_attention(q, k, v, scale=scale)
                if backward:
                    torch.autograd.grad(out, inputs, out)
                end.record()
    except RuntimeError:  # a shape or a device that it was not made for, or no memory
        return None
    torch.cuda.synchronize(inputs[0].device)
    return begin.elapsed_time(end)

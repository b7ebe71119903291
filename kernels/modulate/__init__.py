"""Modulation by the timestep, and gates: what lies between the matrix products of a block, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.launch import apply, fused
from longtake.kernels.modulate import reference


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See `reference.modulate`; Triton computes it where `launch.fused` says so, and so with the others."""
    if fused(x):
        from longtake.kernels.modulate.triton_modulate import Modulate

        return apply(Modulate, x, _of_clips(shift, x), _of_clips(scale, x), reference.EPS)
    return reference.modulate(x, shift, scale)


def add_and_modulate(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and that modulated."""
    if fused(x) and not torch.is_grad_enabled():
        from longtake.kernels.modulate import triton_modulate

        with torch.cuda.device_of(x):
            return triton_modulate.add_and_modulate(x, y, _of_clips(shift, x), _of_clips(scale, x), reference.EPS)
    x = x + y
    return x, modulate(x, shift, scale)


def gated(x: Tensor, gate: Tensor, y: Tensor, more_y: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """See `reference.gated`."""
    if fused(x):
        from longtake.kernels.modulate.triton_gates import Gated

        return apply(Gated, x, _of_clips(gate, x), y, more_y, plus)
    return reference.gated(x, gate, y, more_y, plus)


def output_gate(out: Tensor, gate: Tensor, camera: Tensor | None = None) -> Tensor:
    """See `reference.output_gate`."""
    if fused(out):
        from longtake.kernels.modulate.triton_gates import OutputGate

        return apply(OutputGate, out, gate, camera)
    return reference.output_gate(out, gate, camera)


def _of_clips(modulation: Tensor, x: Tensor) -> Tensor:
    """One for each clip of x, where all share one."""
    return modulation.expand(len(x), -1, -1, -1)

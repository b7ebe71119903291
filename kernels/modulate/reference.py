"""What a block does to each token between its matrix products: the definition (SANA-WM section 1.2).

Legend: B batch, T latent frames, S tokens a frame, N = T S tokens, C hidden size. shift, scale and gate (B, T, 1, C),
one a latent frame. Everything is computed in float32, and rounded once, at the end; float32 modulation makes float32
tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.launch import wide

EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then scale and shift: (B, N, C)."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=EPS).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + wide(scale)) + wide(shift)).flatten(1, 2).to(torch.promote_types(x.dtype, scale.dtype))


def gated(x: Tensor, gate: Tensor, y: Tensor, more_y: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x + gate (y + more_y) + plus; all (B, N, C) but the gate."""
    y = wide(y) if more_y is None else wide(y) + wide(more_y)
    out = wide(x) + (wide(gate) * y.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)
    return (out if plus is None else out + wide(plus)).to(torch.promote_types(x.dtype, gate.dtype))


def output_gate(out: Tensor, gate: Tensor, camera: Tensor | None = None) -> Tensor:
    """(out + camera) silu(gate), in the gate's dtype; all (B, N, C)."""
    out = wide(out) if camera is None else wide(out) + wide(camera)
    return (out * F.silu(wide(gate))).to(gate.dtype)

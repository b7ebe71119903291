"""What stage 1 does to a clip, imitated without it: detail is lost to blur, and a little of what is there is wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a Gaussian, in latent cells, and of the noise left over, at sigma 1.
_SPACE, _TIME, _NOISE = 1.0, 0.5, 0.2


def degraded(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents (B, C, T, h, w) blurred over space and time, the wider the higher `sigma`, and given some of the unit
    noise, blurred alike; the first frame stays as it is.
    """
    blurred = _blurred(latents, sigma) + _NOISE * sigma * _blurred(noise, sigma)
    blurred[:, :, :1] = latents[:, :, :1]
    return blurred


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Edges are repeated outwards."""
    for dim, width in ((2, _TIME), (3, _SPACE), (4, _SPACE)):
        radius = max(1, round(3 * width * sigma))
        offsets = torch.arange(-radius, radius + 1, device=x.device)
        weights = torch.exp(-0.5 * (offsets / (width * sigma)).square())
        moved = x.movedim(dim, -1)
        padded = F.pad(moved.flatten(0, -2)[:, None], (radius, radius), mode="replicate")
        out = F.conv1d(padded, (weights / weights.sum()).to(x.dtype)[None, None])
        x = out[:, 0].view(moved.shape).movedim(-1, dim)
    return x

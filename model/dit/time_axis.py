"""How a block reaches other frames than its own: the one thing that changes when a clip is cut between devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.kernels.attention import attend, attend_float8
from longtake.kernels.gdn import bidirectional_states


class TimeAxis:
    """All frames of the clip are here; a subclass may hold a stretch of them. B batch, T frames held, N tokens."""

    stretches = 1  # that the clip is cut into

    def held(self, x: Tensor, dim: int) -> Tensor:
        """Of a whole clip's x, the frames `dim` that are here."""
        return x

    def place(self, frames: int) -> tuple[int, int]:
        """Of the `frames` that are held: the position of the first in the clip, and how many the clip has."""
        return 0, frames

    def states(self, transition: Tensor, increment: Tensor) -> Tensor:
        """What every frame reads after a scan in both directions, as `bidirectional_states`."""
        return bidirectional_states(transition, increment)

    def around(self, x: Tensor, reach: int, function: Callable[[Tensor], Tensor], dim: int = 1) -> Tensor:
        """function(x) along frames `dim`, where each frame's result depends on up to `reach` frames to either side."""
        return function(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """softmax(q k^T scale) v over all tokens of the clip: (B, N, H, D) each, computed in `dtype`."""
        if dtype == torch.float8_e4m3fn:
            return attend_float8(q, k, v, scale)
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)


WHOLE_CLIP = TimeAxis()

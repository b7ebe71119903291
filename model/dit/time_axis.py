"""How a block reaches other frames than its own: the one thing that changes when a clip is cut between devices, or
padded to the length of another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.attention import attend, attend_float8
from longtake.kernels.gdn import bidirectional_states, every_state
from longtake.kernels.launch import uncompiled
from longtake.model.state import Traces

# Of frames of x, from that one on, as far as they are asked for. Frames before them may be given too, and what was made
# of these.
OverTime = Callable[..., Tensor]


class TimeAxis:
    """All frames of the clip are here; a subclass may hold a stretch of them. B batch, T frames held, N tokens.

    `part` names what of a block asks, for who keeps something of it: "main" and "main camera" are the branches of a
    GDN, "keys" and "camera keys" those of softmax attention. Keys are rotated by position, the values of cameras too.

    stretches: that the clip is cut into. seen: what a pass reads of frames before it; left: what it leaves, where
    anything is to be kept.
    """

    stretches = 1
    seen: Traces = {}  # noqa: RUF012  # replaced, never changed
    left: dict[tuple[int, str], tuple[Tensor, ...]] | None = None

    def held(self, x: Tensor, dim: int) -> Tensor:
        """Of a whole clip's x, the frames `dim` that are here."""
        return x

    def place(self, frames: int) -> tuple[int, int]:
        """Of the `frames` that are held: the position of the first in the clip, and how many the clip has."""
        return 0, frames

    def of_block(self, number: int) -> TimeAxis:
        """The axis as one block of the network sees it."""
        return self

    def form(self) -> Hashable:
        """All but tensors that passes depend on, equal for those that can be replayed; None where none can be."""
        return None

    def reading(self, seen: Traces, keep: bool) -> TimeAxis:
        """The same axis with other tensors to read, and nothing left yet; keep: but it will be."""
        return self

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        """What every frame reads after a scan in both directions, as `bidirectional_states`."""
        return bidirectional_states(transition, increment)

    def every_state(self, *scans: tuple[Tensor, Tensor, str]) -> list[Tensor]:
        """`states` of one or two (transition, increment, part), which a GPU may compute at once."""
        return [self.states(*scan) for scan in scans]

    def around(self, x: Tensor, reach: int, function: OverTime, dim: int = 1, part: str = "") -> Tensor:
        """function(x) along frames `dim`, where each frame's result depends on up to `reach` frames to either side."""
        return function(x, 0)

    def rooms(self, part: str, tokens: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Memory where `attend` would put so many tokens' keys and values, and need not if they are there."""
        return None, None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dtype: torch.dtype,
        real: Tensor | None = None,
        part: str = "",
    ) -> Tensor:
        """softmax(q k^T scale) v over all tokens of the clip: (B, N, H, D) each, computed in `dtype`.

        real: how many of each clip's tokens, its first ones, are to attend and to be attended to; int64 (B,), on the
        CPU, where None stands for all. The other tokens' results are zeros.
        """
        if real is not None:
            return _each_clip_alone(q, k, v, scale, dtype, real)
        if dtype == torch.float8_e4m3fn:
            return attend_float8(q, k, v, scale)
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)


class _WholeClip(TimeAxis):
    def form(self) -> Hashable:
        return ()

    def every_state(self, *scans: tuple[Tensor, Tensor, str]) -> list[Tensor]:
        return every_state(*((transition, increment, None) for transition, increment, _ in scans))


WHOLE_CLIP = _WholeClip()


class Padded(TimeAxis):
    """`axis` of clips that are padded at their ends: a real frame gets what it would get in its clip alone.

    frames: how many of each clip's are real, int64 (B,) on the CPU; grid: (T held, height, width); device: of what is
    to be computed. Padded frames get something finite that means nothing.
    """

    def __init__(self, axis: TimeAxis, frames: Tensor, grid: tuple[int, int, int], device: torch.device):
        self.axis, self.stretches = axis, axis.stretches
        real = torch.arange(axis.place(grid[0])[1]) < frames[:, None]
        self.padding = ~axis.held(real, 1).to(device)
        self.tokens = frames * grid[1] * grid[2]

    def held(self, x: Tensor, dim: int) -> Tensor:
        return self.axis.held(x, dim)

    def place(self, frames: int) -> tuple[int, int]:
        return self.axis.place(frames)

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        # What padding does not add, nobody reads: forwards it comes last, and backwards a state of zeros passes through
        # it, whatever its transitions. Branches lie one after another in the batch.
        padding = self.padding.repeat(len(increment) // len(self.padding), 1)[..., None, None, None]
        return self.axis.states(transition, increment.masked_fill(padding, 0), part)

    def around(self, x: Tensor, reach: int, function: OverTime, dim: int = 1, part: str = "") -> Tensor:
        shape = [1] * x.ndim
        shape[0], shape[dim] = self.padding.shape
        # Frames outside a clip are zeros to a convolution.
        return self.axis.around(x.masked_fill(self.padding.view(shape), 0), reach, function, dim, part)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dtype: torch.dtype,
        real: Tensor | None = None,
        part: str = "",
    ) -> Tensor:
        assert real is None
        return self.axis.attend(q, k, v, scale, dtype, self.tokens, part)


def _of_each_clip(q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, real: Tensor) -> Tensor:
    # Not one call with a mask: the fastest backends take none, and this computes nothing of what is padded.
    parts = []
    for clip, count in enumerate(real.tolist()):
        here = slice(clip, clip + 1), slice(count)
        part = WHOLE_CLIP.attend(q[here], k[here], v[here], scale, dtype)
        parts.append(F.pad(part, (0, 0, 0, 0, 0, q.shape[1] - count)))
    return torch.cat(parts)


_each_clip_alone = uncompiled(_of_each_clip)  # lengths would each be compiled

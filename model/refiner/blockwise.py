"""Every block of a clip in one pass, as `RefinerStream` comes to each after refining the ones before it: for training.

The pass holds the clip's clean frames, of which the last block's are left out, since none comes after it, and then the
noisy ones but the sink's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.kernels.attention import attend
from longtake.model.refiner.network import Rotation, rotated

SINK = 1  # latent frames


@dataclass(frozen=True)
class Blocks:
    """What the tokens of such a pass see: the sink itself alone; a clean block or a noisy one the sink, moved to right
    before the window, the clean frames of the window before the block, and itself.

    sizes: latent frames of each block; window: of frames that a block sees beside itself, the sink too; area: tokens a
    frame.
    """

    sizes: Sequence[int]
    window: int
    area: int

    @property
    def clean(self) -> int:
        """Clean frames of the pass."""
        return SINK + sum(self.sizes[:-1])

    @property
    def places(self) -> list[int]:
        """Of the pass' frames in their video."""
        return [*range(self.clean), *range(SINK, SINK + sum(self.sizes))]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Attention of queries, keys and values (B, N, H, D) that are not yet rotated."""
        sink, turned, scale = self._tokens(0, SINK), rotated(k, rotation), q.shape[-1] ** -0.5
        q = rotated(q, rotation)
        out = [attend(q[:, sink], turned[:, sink], v[:, sink], scale)]
        for first, begin, size in self._blocks():
            history = min(begin - SINK, self.window - SINK)
            there, before = self._tokens(begin - history - SINK, SINK), self._tokens(begin - history, history)
            own = self._tokens(first, size)
            moved = rotated(k[:, sink], (rotation[0][there], rotation[1][there]))
            keys = torch.cat([moved, turned[:, before], turned[:, own]], 1)
            values = torch.cat([v[:, sink], v[:, before], v[:, own]], 1)
            out.append(attend(q[:, own], keys, values, scale))
        return torch.cat(out, 1)

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """Of the pass' clean and then noisy blocks: first frame in the pass, first frame in the video, frames."""
        for offset, sizes in ((0, self.sizes[:-1]), (self.clean - SINK, self.sizes)):
            begin = SINK
            for size in sizes:
                yield offset + begin, begin, size
                begin += size

    def _tokens(self, first: int, frames: int) -> slice:
        return slice(first * self.area, (first + frames) * self.area)

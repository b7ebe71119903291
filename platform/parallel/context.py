"""Context parallelism: the latent frames of one clip lie on several ranks, a stretch on each, exactly as on one device.

Per block, a rank exchanges the map of its whole stretch (D (D + V) numbers a head, to every other rank), the frames
that the next ranks' convolutions reach, and in softmax blocks either queries, keys and values by head, or keys and
values round a ring (ring.py); traffic.py has the sums. Gradients cross the same way back: with a loss that is the
rank's share of the clip's, a parameter's gradients sum to the clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.model.dit.time_axis import TimeAxis
from longtake.platform.parallel.peers import Peers
from longtake.platform.parallel.ring import ring_attention
from longtake.platform.parallel.scan import shared_scan

AttentionExchange = Literal["heads", "ring"]


class ContextParallel(TimeAxis):
    """This rank's stretch of a clip of `frames` latent frames; `group` holds the clip's ranks in order of time.

    attention: how softmax blocks see all tokens. By "heads", a rank computes some of the heads over the whole clip:
    with more ranks than heads the rest of them idle meanwhile. By "ring", each computes its own queries, and what
    arrives next travels meanwhile. It suits any number of ranks, but beyond two they send more (traffic.py).
    """

    def __init__(self, frames: int, group: dist.ProcessGroup | None = None, attention: AttentionExchange = "heads"):
        assert attention in get_args(AttentionExchange), attention
        self.peers = Peers(group or dist.group.WORLD)  # type: ignore[arg-type]
        self.rank, self.stretches, self.attention = self.peers.rank, self.peers.count, attention
        if frames < self.stretches:
            raise ValueError(
                f"{frames} latent frames cannot be cut into {self.stretches} stretches: use fewer ranks a clip"
            )
        self.counts = even(frames, self.stretches)
        self.firsts = [sum(self.counts[:rank]) for rank in range(self.stretches)]

    def held(self, x: Tensor, dim: int) -> Tensor:
        assert x.shape[dim] == sum(self.counts), f"{x.shape[dim]} frames of a clip of {sum(self.counts)}"
        return x.narrow(dim, self.firsts[self.rank], self.counts[self.rank])

    def place(self, frames: int) -> tuple[int, int]:
        assert frames == self.counts[self.rank], f"{frames} frames were given, this rank holds {self.counts[self.rank]}"
        return self.firsts[self.rank], sum(self.counts)

    def states(self, transition: Tensor, increment: Tensor) -> Tensor:
        return shared_scan(self.peers, transition, increment)

    def around(self, x: Tensor, reach: int, function: Callable[[Tensor], Tensor], dim: int = 1) -> Tensor:
        parts, shapes = [], []
        for rank in range(self.stretches):
            start, length = self._reached_by(rank, self.rank, reach)
            parts.append(x.narrow(dim, start, length))
            shape = list(x.shape)
            shape[dim] = self._reached_by(self.rank, rank, reach)[1]
            shapes.append(shape)
        received = self._exchange("halo", parts, shapes)
        received[self.rank] = x
        y = function(torch.cat(received, dim))
        return y.narrow(dim, sum(part.shape[dim] for part in received[: self.rank]), x.shape[dim])

    def _reached_by(self, rank: int, holder: int, reach: int) -> tuple[int, int]:
        """Which frames of `holder` lie within `reach` of the stretch of `rank`: (first within holder's, count)."""
        first, last = self.firsts[holder], self.firsts[holder] + self.counts[holder]
        start = max(first, self.firsts[rank] - reach)
        end = min(last, self.firsts[rank] + self.counts[rank] + reach)
        return (start - first, end - start) if rank != holder and start < end else (0, 0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, real: Tensor | None = None
    ) -> Tensor:
        batch, tokens, heads, channels = q.shape
        area = tokens // self.counts[self.rank]
        exact = dtype.itemsize > 1
        if exact:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if self.attention == "ring":
            if not exact:
                raise ValueError("ring attention is not computed in float8: exchange heads instead")
            if real is not None:
                raise ValueError("ring attention reads padding as if it were real: exchange heads instead")
            return ring_attention(self.peers, [area * count for count in self.counts], q, k, v, scale)
        mine = even(heads, self.stretches)
        qkv = torch.stack([q, k, v])
        shapes = [(3, batch, area * count, mine[self.rank], channels) for count in self.counts]
        q, k, v = torch.cat(self._exchange("attention", qkv.split(mine, dim=3), shapes), dim=2)
        out = super().attend(q, k, v, scale, dtype, real)  # all tokens, some heads
        shapes = [(batch, tokens, count, channels) for count in mine]
        parts = out.split([area * count for count in self.counts], dim=1)
        return torch.cat(self._exchange("attention", parts, shapes), dim=2)

    def _exchange(self, what: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give parts[r] to rank r, and get from it a tensor of shapes[r]."""
        return list(_exchanged(self.peers, what, shapes, *parts))


class _Exchange(torch.autograd.Function):
    """Every rank's part for every other; gradients go back to where the part came from."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, what: str, shapes: Sequence[Sequence[int]], *parts: Tensor) -> Any:
        ctx.peers, ctx.what, ctx.shapes = peers, what, [part.shape for part in parts]
        return peers.swap(what, parts, shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, None, *ctx.peers.swap(ctx.what, gradients, ctx.shapes)


_exchanged: Any = torch.compiler.disable(_Exchange.apply)  # compiled blocks are cut here


def own_clip(frames: int, ranks: int, attention: AttentionExchange = "heads") -> ContextParallel:
    """The time axis of this process when every `ranks` consecutive ranks of the world share a clip of `frames`.

    Collective: all ranks call it. ValueError when the world's size is no multiple of `ranks`.
    """
    group, _ = dist.new_subgroups(ranks)
    assert isinstance(group, dist.ProcessGroup)
    return ContextParallel(frames, group, attention)


def even(count: int, parts: int) -> list[int]:
    """`count` things shared out as evenly as can be, the first parts one more."""
    return [count // parts + (part < count % parts) for part in range(parts)]

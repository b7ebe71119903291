"""Context parallelism: the latent frames of one clip lie on several ranks, a stretch on each, exactly as on one device.

Per block, a rank exchanges the map of its whole stretch (D (D + V) numbers a head, to every other rank), the frames
that the next ranks' convolutions reach, and in softmax blocks either queries, keys and values by head, or keys and
values round a ring (ring.py); traffic.py has the sums. Gradients cross the same way back: with a loss that is the
rank's share of the clip's, a parameter's gradients sum to the clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.model.config import WorldModelConfig
from longtake.model.dit.checkpointing import once
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes
from longtake.model.dit.time_axis import OverTime, TimeAxis
from longtake.platform.parallel.peers import Peers, copied
from longtake.platform.parallel.ring import ring_attention
from longtake.platform.parallel.scan import shared_scan

AttentionExchange = Literal["heads", "ring"]
_eager: Any = torch.compiler.disable  # compiled blocks are cut here


class ContextParallel(TimeAxis):
    """This rank's stretch of a clip of `frames` latent frames; `group` holds the clip's ranks in order of time.

    attention: how softmax blocks see all tokens. By "heads", a rank computes some of the heads over the whole clip:
    with more ranks than heads the rest of them idle meanwhile. By "ring", each computes its own queries, and what
    arrives next travels meanwhile. It suits any number of ranks, but beyond two they send more (traffic.py).
    """

    reaches_later = True  # frames, as well as earlier ones

    def __init__(
        self,
        frames: int | Sequence[int],
        group: dist.ProcessGroup | None = None,
        attention: AttentionExchange = "heads",
    ):
        """frames: or the frames of pieces that are not to be cut."""
        assert attention in get_args(AttentionExchange), attention
        self.peers = Peers(group or dist.group.WORLD)  # type: ignore[arg-type]
        self.rank, self.stretches, self.attention = self.peers.rank, self.peers.count, attention
        pieces = [1] * frames if isinstance(frames, int) else list(frames)
        if len(pieces) < self.stretches:
            what = "latent frames" if isinstance(frames, int) else "chunks"
            raise ValueError(
                f"{len(pieces)} {what} cannot be cut into {self.stretches} stretches: use fewer ranks a clip"
            )
        self.pieces = shares(pieces, self.stretches)
        self.counts = [sum(each) for each in self.pieces]
        self.firsts = [sum(self.counts[:rank]) for rank in range(self.stretches)]

    def held(self, x: Tensor, dim: int) -> Tensor:
        assert x.shape[dim] == sum(self.counts), f"{x.shape[dim]} frames of a clip of {sum(self.counts)}"
        return x.narrow(dim, self.firsts[self.rank], self.counts[self.rank])

    def place(self, frames: int) -> tuple[int, int]:
        assert frames == self.counts[self.rank], f"{frames} frames were given, this rank holds {self.counts[self.rank]}"
        return self.firsts[self.rank], sum(self.counts)

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        return shared_scan(self.peers, transition, increment)

    def around(self, x: Tensor, reach: int, function: OverTime, dim: int = 1, part: str = "") -> Tensor:
        before = sum(self._reached_by(self.rank, holder, reach)[1] for holder in range(self.rank))
        return function(self._with_neighbours(x, reach, dim), 0).narrow(dim, before, x.shape[dim])

    @_eager
    def _with_neighbours(self, x: Tensor, reach: int, dim: int) -> Tensor:
        """x between the frames `dim` of other ranks that its own reach."""
        ranks = range(self.stretches)
        reached = [self._reached_by(rank, self.rank, reach) for rank in ranks]  # of this rank's
        counts = [self._reached_by(self.rank, rank, reach)[1] for rank in ranks]
        whole = [x.shape[dim] if rank == self.rank else counts[rank] for rank in ranks]

        # Neither may hold on to x, which a checkpointed block lets go.
        def there(x: Tensor) -> tuple[Tensor]:
            gives = [x.narrow(dim, *frames) for frames in reached]
            parts = list(once(lambda: self._passed(gives, counts, dim)))
            parts[self.rank] = x
            result = x.new_empty([*x.shape[:dim], sum(whole), *x.shape[dim + 1 :]])
            for into, part in zip(result.split(whole, dim), parts, strict=True):
                copied(into, part)
            return (result,)

        def back(gradient: Tensor) -> tuple[Tensor]:
            parts = list(gradient.split(whole, dim))
            own = parts[self.rank].clone()
            parts[self.rank] = own.narrow(dim, 0, 0)
            for frames, part in zip(reached, self._passed(parts, [n for _, n in reached], dim), strict=True):
                own.narrow(dim, *frames).add_(part)
            return (own,)

        return _Exchange.apply(there, back, x)[0]  # type: ignore[index]

    def _passed(self, gives: Sequence[Tensor], counts: Sequence[int], dim: int) -> list[Tensor]:
        """Give gives[r] to rank r, and get counts[r] frames `dim` from it."""
        takes, shape = [], list(gives[0].shape)
        for shape[dim] in counts:
            takes.append(gives[0].new_empty(shape))
        self.peers.swap("halo", [[give] for give in gives], [[take] for take in takes])
        return takes

    def _reached_by(self, rank: int, holder: int, reach: int) -> tuple[int, int]:
        """Which frames of `holder` lie within `reach` of the stretch of `rank`: (first within holder's, count)."""
        first, last = self.firsts[holder], self.firsts[holder] + self.counts[holder]
        start = max(first, self.firsts[rank] - reach)
        end = min(last, self.firsts[rank] + self.counts[rank] + reach if self.reaches_later else self.firsts[rank])
        return (start - first, end - start) if rank != holder and start < end else (0, 0)

    @_eager
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
        shares = even(heads, self.stretches), [area * count for count in self.counts]
        to_heads, to_tokens = partial(self._resharded, *shares, 2, 1), partial(self._resharded, *shares[::-1], 1, 2)
        q, k, v = _Exchange.apply(to_heads, to_tokens, q, k, v)  # type: ignore[misc]
        out = self.attend_to_all(q, k, v, scale, dtype, real)
        return _Exchange.apply(to_tokens, to_heads, out)[0]  # type: ignore[index]

    def attend_to_all(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, real: Tensor | None
    ) -> Tensor:
        """`attend` of all tokens and some of the heads."""
        return super().attend(q, k, v, scale, dtype, real)

    def _resharded(self, cuts: list[int], joins: list[int], cut: int, join: int, *xs: Tensor) -> tuple[Tensor, ...]:
        """Of each x, all that is cut along one dimension, of which each rank gets its share, and joined along another,
        of which each has had its share.
        """
        results = []
        for x in xs:
            shape = list(x.shape)
            shape[cut], shape[join] = cuts[self.rank], sum(joins)
            results.append(x.new_empty(shape))
        gives = zip(*(x.split(cuts, cut) for x in xs), strict=True)
        takes = zip(*(result.split(joins, join) for result in results), strict=True)
        self.peers.swap("attention", list(gives), list(takes))
        return tuple(results)


class _Exchange(torch.autograd.Function):
    """`there`, which is linear in the tensors, with its transpose `back`."""

    @staticmethod
    def forward(ctx: Any, there: Callable[..., Any], back: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.back = back
        return there(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.back(*gradients)


class SharedChunks(ContextParallel):
    """As `ChunkCausal`, whole chunks on each rank: convolutions reach back alone, and one scan goes over the ranks."""

    reaches_later = False

    def __init__(self, sizes: Sequence[int], window: int | None = None, group: dist.ProcessGroup | None = None):
        super().__init__(sizes, group)
        self.sizes, self.window = sizes, window
        self._own = ChunkCausal(self.pieces[self.rank], window)

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        return shared_scan(self.peers, transition, increment, both=False) + self._own.later_states(
            transition, increment
        )

    def around(self, x: Tensor, reach: int, function: OverTime, dim: int = 1, part: str = "") -> Tensor:
        return self._own.by_chunk(self._with_neighbours(x, reach, dim), reach, function)

    def attend_to_all(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, real: Tensor | None
    ) -> Tensor:
        return ChunkCausal(self.sizes, self.window).attend(q, k, v, scale, dtype, real)


def own_clip(
    config: WorldModelConfig, frames: int, ranks: int, attention: AttentionExchange = "heads"
) -> ContextParallel:
    """The time axis of this process when every `ranks` consecutive ranks of the world share a clip of `frames` latent
    ones.

    Collective: all ranks call it. ValueError when the world's size is no multiple of `ranks`, and where there are more
    ranks than frames, or chunks.
    """
    group, _ = dist.new_subgroups(ranks)
    assert isinstance(group, dist.ProcessGroup)
    if config.chunk_causal:
        return SharedChunks(chunk_sizes(frames, config.chunk_size), config.chunk_window, group)
    return ContextParallel(frames, group, attention)


def shares(pieces: Sequence[int], parts: int) -> list[Sequence[int]]:
    """The pieces in order, shared out by `even`."""
    ends = accumulate(even(len(pieces), parts), initial=0)
    return [pieces[first:end] for first, end in pairwise(ends)]


def even(count: int, parts: int) -> list[int]:
    """`count` things shared out as evenly as can be, the first parts one more."""
    return [count // parts + (part < count % parts) for part in range(parts)]

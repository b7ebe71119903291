"""The chunk-causal network: a frame sees its own chunk and the ones before, so that a video can go on for ever.

A clip of several chunks at once and the same clip chunk by chunk, each from the `StreamState` that the last one left,
give the same numbers (SANA-WM sections 1.11, 1.12 and 3.3). The GDN scans forwards over all frames and backwards within
a chunk; convolutions over time see frames of the past, and zeros after the chunk; softmax attention sees all earlier
chunks, or the first and the last few.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.gdn import every_state, scan_states
from longtake.kernels.launch import in_sixteens
from longtake.model.dit.past import seen_from
from longtake.model.dit.positions import RotaryTable
from longtake.model.dit.time_axis import OverTime, TimeAxis
from longtake.model.state import KEYS, StreamState, Traces


def chunk_sizes(frames: int, size: int) -> list[int]:
    """Latent frames of each chunk of a clip: `size`, and what remains is the first's. ValueError for no frame."""
    if frames < 1 or size < 1:
        raise ValueError(f"{frames} latent frames cannot be cut into chunks of {size}: both must be at least 1")
    count = max(1, frames // size)
    return [frames - size * (count - 1)] + [size] * (count - 1)


def each_frame(of_chunks: Tensor, sizes: Sequence[int]) -> Tensor:
    """What chunks have (B, chunks), for each of their frames (B, T)."""
    return torch.cat([of_chunks[:, n : n + 1].expand(-1, size) for n, size in enumerate(sizes)], 1)


class ChunkCausal(TimeAxis):
    """Chunks of `sizes` latent frames, all of them here, after those that left `past`.

    window: how many of the chunks before its own softmax attention sees beside the very first; None is all. rotary: the
    network's, where there is a past. keep: each forward pass, without gradients, leaves what `after` makes a past of.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        window: int | None = None,
        past: StreamState | None = None,
        rotary: RotaryTable | None = None,
        keep: bool = False,
    ):
        self.sizes, self.window, self.past, self._block = list(sizes), window, past or StreamState(), 0
        self.seen, self.left = seen_from(self.past, sum(self.sizes), rotary), {} if keep else None
        chunks = range(self.past.chunks, self.past.chunks + len(self.sizes))
        # Chunks whose keys are here.
        self._known = [*self.past.kept, *((*each, self.past.frames) for each in zip(chunks, self.sizes, strict=True))]

    def place(self, frames: int) -> tuple[int, int]:
        assert frames == sum(self.sizes), f"{frames} frames were given, the chunks have {sum(self.sizes)}"
        return 0, frames

    def of_block(self, number: int) -> ChunkCausal:
        own = copy(self)
        own._block = number
        return own

    def keeping(self) -> ChunkCausal:
        """The same axis, of passes that are kept."""
        own = copy(self)
        own.left = {}
        return own

    def reading(self, seen: Traces, keep: bool) -> ChunkCausal:
        own = copy(self)
        own.past, own.seen, own.left = replace(self.past, traces={}), seen, {} if keep else None
        return own

    def form(self) -> Hashable:
        """Of passes over one chunk, of a bounded window; others are each unlike the one before."""
        return None if self.window is None or len(self.sizes) > 1 else (*self.sizes, self.past.place(self.window))

    def after(self) -> StreamState:
        """The past of what comes next, once a forward pass has been kept."""
        assert self.left, "no pass was made, or none to be kept"
        ahead = self.past.chunks + len(self.sizes)
        kept = tuple(each for each in self._known if self._visible(each[0], ahead))
        traces = {at: self._with_past(at, trace, ahead) for at, trace in self.left.items()}
        return StreamState(self.past.frames + sum(self.sizes), ahead, self.past.frames, kept, traces)

    def _with_past(self, at: tuple[int, str], trace: tuple[Tensor, ...], ahead: int) -> tuple[Tensor, ...]:
        """In memory of its own: of keys and values, those that chunk `ahead` will see, as they were made, so that
        nothing is turned twice.
        """
        if at[1] not in KEYS:
            return trace
        before = self.past.traces.get(at)
        length = 0 if before is None else before[0].shape[1]
        runs = self._seen(ahead, trace[0].shape[1] // sum(self.sizes))

        def kept(past: Tensor, own: Tensor) -> Tensor:
            old = [past[:, first:end] for first, end in runs if first < length]
            new = [own[:, max(first - length, 0) : end - length] for first, end in runs if end > length]
            return torch.cat([*old, *new], 1)

        return tuple(kept(*pair) for pair in zip(before or trace, trace, strict=True))

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        if len(self.sizes) == 1:
            return self.every_state((transition, increment, part))[0]
        (state,) = self.seen.get((self._block, part), (None,))
        forwards = scan_states(transition, increment, state)
        self._leave(part, forwards[:, -1])
        return forwards + self.later_states(transition, increment)

    def every_state(self, *scans: tuple[Tensor, Tensor, str]) -> list[Tensor]:
        if len(self.sizes) > 1:
            return super().every_state(*scans)
        starts = [self.seen.get((self._block, part), (None,))[0] for *_, part in scans]
        every = every_state(*((*scan[:2], start) for scan, start in zip(scans, starts, strict=True)))
        for (*_, part), states in zip(scans, every, strict=True):
            self._leave(part, states[:, -1])  # the last frame reads nothing backwards
        return every

    def later_states(self, transition: Tensor, increment: Tensor) -> Tensor:
        """What the later frames of each chunk left, scanning backwards."""
        begins = torch.zeros(sum(self.sizes), 1, 1, 1, dtype=torch.bool, device=transition.device)
        for first in accumulate(self.sizes[:-1], initial=0):
            begins[first] = True

        def shifted(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :1]), x.masked_fill(begins, 0)[:, 1:].flip(1)], 1)

        return scan_states(shifted(transition), shifted(increment)).flip(1)

    def around(self, x: Tensor, reach: int, function: OverTime, dim: int = 1, part: str = "") -> Tensor:
        assert dim == 1
        before, *made = self.seen.get((self._block, part), (None,))
        if before is None or len(self.sizes) > 1 or torch.is_grad_enabled():
            x = self._after_reach(x if before is None else torch.cat([before, x], 1), reach)
            self._leave(part, x[:, x.shape[1] - reach :])
            return self.by_chunk(x, reach, function)
        last = x if x.shape[1] >= reach else torch.cat([before, x], 1)
        self._leave(part, last[:, last.shape[1] - reach :])
        return function(x, 0, before, *made)

    def by_chunk(self, x: Tensor, reach: int, function: OverTime) -> Tensor:
        """function(x) chunk by chunk, each after the `reach` frames before it: x begins with those of the first chunk,
        or with fewer where the clip does.
        """
        x = self._after_reach(x, reach)
        if len(self.sizes) == 1:
            return function(x, reach)
        results, first = [], 0
        for size, alike in groupby(self.sizes):
            count = len(list(alike))
            starts = range(first, first + count * size, size)
            windows = torch.stack([x[:, start : start + reach + size] for start in starts], 1)
            y = function(windows.flatten(0, 1), reach).unflatten(0, (-1, count))
            results.append(y.flatten(1, 2))
            first += count * size
        return torch.cat(results, 1)

    def _after_reach(self, x: Tensor, reach: int) -> Tensor:
        # Frames before the beginning are zeros to a convolution.
        lacking = reach + sum(self.sizes) - x.shape[1]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (lacking, 0)) if lacking else x

    def rooms(self, part: str, tokens: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        before = self.seen.get((self._block, part))
        if before is None or torch.is_grad_enabled():
            return None, None
        k, v = before
        return k[:, -tokens:], v[:, -tokens:]

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
        if real is not None:
            raise ValueError("chunk-causal attention reads padding as if it were real: give clips of one length")
        if dtype.itemsize > 1:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        tokens, area = q.shape[1], q.shape[1] // sum(self.sizes)
        k, v = self._after_past(part, k, v)
        self._leave(part, k[:, -tokens:], v[:, -tokens:])
        outs: list[Tensor] = []
        for chunk, queries in enumerate(q.split([area * size for size in self.sizes], 1), self.past.chunks):
            runs = self._seen(chunk, area)
            outs.append(super().attend(queries, _joined(k, runs), _joined(v, runs), scale, dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _seen(self, by: int, area: int) -> list[tuple[int, int]]:
        """Which of the keys here chunk `by` sees, as runs of tokens: (first, end) each."""
        runs, end = [], 0
        for chunk, size, _ in self._known:
            first, end = end, end + area * size
            if self._visible(chunk, by):
                joins = runs and runs[-1][1] == first
                runs.append((runs.pop()[0], end) if joins else (first, end))
        return runs

    def _visible(self, chunk: int, by: int) -> bool:
        """Whether chunk `by` sees the keys of `chunk`."""
        return chunk <= by and (self.window is None or chunk == 0 or chunk >= by - self.window)

    def _after_past(self, part: str, *own: Tensor) -> tuple[Tensor, ...]:
        """Keys and values after those that a part of the block sees of the past, if there are any."""
        if (before := self.seen.get((self._block, part))) is None:
            return own
        length = own[0].shape[1]
        if torch.is_grad_enabled():
            return tuple(torch.cat([past[:, :-length], x], 1) for past, x in zip(before, own, strict=True))
        for room, x in zip(before, own, strict=True):
            if (place := room[:, -length:]).data_ptr() != x.data_ptr():
                _filled(place, x)
        return before

    def _leave(self, part: str, *trace: Tensor) -> None:
        if self.left is not None and not torch.is_grad_enabled():
            # These may be parts of activations; `after` copies keys and values anyway.
            own = trace if part in KEYS else tuple(_filled(x.new_empty(x.shape), x) for x in trace)
            self.left[self._block, part] = own


def _joined(x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """These tokens of x (B, N, H, D)."""
    parts = [x[:, first:end] for first, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _filled(to: Tensor, x: Tensor) -> Tensor:
    """`to`, with x: torch copies parts of wider rows number by number, so 16 bytes are one where they lie so."""
    compiled = torch.compiler.is_compiling()  # which copies as it likes
    whole = to.dtype == x.dtype and x.shape[-1] * x.element_size() % 16 == 0
    if whole and not compiled and in_sixteens(to) and in_sixteens(x):
        to.view(torch.complex128).copy_(x.view(torch.complex128))
        return to
    return to.copy_(x)

"""The chunk-causal network: a frame sees its own chunk and the ones before, so that a video can go on for ever.

A clip of several chunks at once and the same clip chunk by chunk, each from the `StreamState` that the last one left,
give the same numbers (SANA-WM sections 1.11, 1.12 and 3.3). The GDN scans forwards over all frames and backwards within
a chunk; convolutions over time see frames of the past, and zeros after the chunk; softmax attention sees all earlier
chunks, or the first and the last few.

Positions count from the first frame of a pass. Rotary ones tell how far a key is from its query and nothing else, so
what is kept of the past is turned back by the frames between: a video may go on past the positions that the network
was trained with, the first chunk staying as far away as the furthest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.gdn import bidirectional_states, scan_states
from longtake.kernels.ucpe import encode
from longtake.kernels.ucpe.reference import rotate
from longtake.model.dit.positions import RotaryTable
from longtake.model.dit.time_axis import TimeAxis
from longtake.model.state import StreamState, joined

_Traces = dict[str, Callable[[], tuple[Tensor, ...]]]
Turned = dict[tuple[int, str], tuple[Tensor, ...]]  # by block and part


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
    """Chunks of `sizes` latent frames, all of them here, after those that left `past`. For one forward pass, which
    leaves a past itself if it is one without gradients.

    window: how many of the chunks before its own softmax attention sees beside the very first; None is all. rotary: the
    network's, where there is a past. turned: of that past, what earlier passes have turned; this one adds to it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        window: int | None = None,
        past: StreamState | None = None,
        rotary: RotaryTable | None = None,
        turned: Turned | None = None,
    ):
        self.sizes, self.window, self.past, self.rotary = list(sizes), window, past or StreamState(), rotary
        self._block, self._turned = 0, {} if turned is None else turned
        # What this pass leaves: most passes are not asked for it.
        self._traces: _Traces = {}
        self._of_blocks: dict[int, _Traces] = {}
        chunks = range(self.past.chunks, self.past.chunks + len(self.sizes))
        # Chunks whose keys are here.
        self._known = [*self.past.kept, *((*each, self.past.frames) for each in zip(chunks, self.sizes, strict=True))]

    def place(self, frames: int) -> tuple[int, int]:
        assert frames == sum(self.sizes), f"{frames} frames were given, the chunks have {sum(self.sizes)}"
        return 0, frames

    def of_block(self, number: int) -> ChunkCausal:
        own = copy(self)
        own._block, own._traces = number, self._of_blocks.setdefault(number, {})
        return own

    def after(self) -> StreamState:
        """The past of what comes next, once a forward pass without gradients is done."""
        assert self._of_blocks, "no pass was made, or one with gradients"
        last = self.past.chunks + len(self.sizes) - 1
        kept = tuple(each for each in self._known if self._visible(each[0], last + 1))
        parts = ((block, part, of) for block, left in self._of_blocks.items() for part, of in left.items())
        traces = {(block, part): of() for block, part, of in parts}
        return StreamState(self.past.frames + sum(self.sizes), last + 1, self.past.frames, kept, traces)

    def states(self, transition: Tensor, increment: Tensor, part: str = "") -> Tensor:
        state = self._start(part)
        if len(self.sizes) == 1:
            # The last frame reads nothing backwards.
            states = bidirectional_states(transition, increment, state)
            self._leave(part, lambda: (states[:, -1].clone(),))
            return states
        forwards = scan_states(transition, increment, state)
        self._leave(part, lambda: (forwards[:, -1].clone(),))
        return forwards + self.later_states(transition, increment)

    def later_states(self, transition: Tensor, increment: Tensor) -> Tensor:
        """What the later frames of each chunk left, scanning backwards."""
        begins = torch.zeros(sum(self.sizes), dtype=torch.bool)
        begins[list(accumulate(self.sizes[:-1], initial=0))] = True
        begins = begins[:, None, None, None].to(transition.device)

        def shifted(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :1]), x.masked_fill(begins, 0)[:, 1:].flip(1)], 1)

        return scan_states(shifted(transition), shifted(increment)).flip(1)

    def around(
        self, x: Tensor, reach: int, function: Callable[[Tensor], Tensor], dim: int = 1, part: str = ""
    ) -> Tensor:
        assert dim == 1
        tail = self._from_past(part)
        x = self._after_reach(torch.cat(tail + (x,), 1) if tail else x, reach)
        self._leave(part, lambda: (x[:, x.shape[1] - reach :].clone(),))
        return self.by_chunk(x, reach, function)

    def by_chunk(self, x: Tensor, reach: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(x) chunk by chunk, each after the `reach` frames before it: x begins with those of the first chunk,
        or with fewer where the clip does.
        """
        x = self._after_reach(x, reach)
        results, first = [], 0
        for size, alike in groupby(self.sizes):
            count = len(list(alike))
            starts = range(first, first + count * size, size)
            windows = torch.stack([x[:, start : start + reach + size] for start in starts], 1)
            y = function(windows.flatten(0, 1)).unflatten(0, (-1, count))
            results.append(y[:, :, reach:].flatten(1, 2))
            first += count * size
        return torch.cat(results, 1)

    def _after_reach(self, x: Tensor, reach: int) -> Tensor:
        # Frames before the beginning are zeros to a convolution.
        lacking = reach + sum(self.sizes) - x.shape[1]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (lacking, 0)) if lacking else x

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
        area = q.shape[1] // sum(self.sizes)
        before, own = self._from_past(part), (k, v)
        if before:
            k, v = (torch.cat(pair, 1) for pair in zip(self._seen_from_here(before, part, area), own, strict=True))
        outs, ahead = [], self.past.chunks + len(self.sizes)
        for chunk, queries in enumerate(q.split([area * size for size in self.sizes], 1), self.past.chunks):
            runs = self._seen(chunk, area)
            outs.append(super().attend(queries, _joined(k, runs), _joined(v, runs), scale, dtype))

        def kept() -> tuple[Tensor, ...]:  # as they were made, so that nothing is turned twice
            whole = (torch.cat(pair, 1) for pair in zip(before, own, strict=True)) if before else own
            return tuple(_joined(x, self._seen(ahead, area)).clone() for x in whole)

        self._leave(part, kept)
        return torch.cat(outs, 1)

    def _seen_from_here(self, before: tuple[Tensor, ...], part: str, area: int) -> tuple[Tensor, ...]:
        """Keys and values of the past where this pass' positions have them."""
        if (self._block, part) not in self._turned:
            clips = max((len(origin) for *_, origin in self.past.kept if isinstance(origin, tuple)), default=1)
            alone = [x.unflatten(0, (-1, clips)).unbind(1) for x in before]
            turned = [self._turned_back(k, v, part, area, clip) for clip, (k, v) in enumerate(zip(*alone, strict=True))]
            self._turned[self._block, part] = tuple(joined(each) for each in zip(*turned, strict=True))
        return self._turned[self._block, part]

    def _turned_back(self, k: Tensor, v: Tensor, part: str, area: int, clip: int) -> tuple[Tensor, Tensor]:
        """Of one of the clips, as far as it is long ago."""
        assert self.rotary is not None
        turns = []
        for _, size, origin in self.past.kept:
            since = origin[clip] if isinstance(origin, tuple) else origin
            ago = min(self.past.frames - since, self.rotary.max_positions - sum(self.sizes))
            turns.append(self.rotary.turn(ago, k.device)[part == "camera"].expand(area * size, -1, -1))
        back, unmoved = torch.cat(turns), None
        if part == "camera":
            unmoved = torch.eye(4, device=k.device).expand(1, k.shape[1], 4, 4).contiguous()
            v = encode(v, back, matrix=unmoved, inverse_rope=True)[0].to(v.dtype)
        return encode(k, back, matrix=unmoved, inverse_rope=True)[0].to(k.dtype), v

    def _start(self, part: str) -> Tensor | None:
        """The state that a scan forwards starts from, None at the beginning."""
        if not (before := self._from_past(part)):
            return None
        (state,) = before
        if part not in ("main", "main camera"):
            return state
        if (self._block, part) not in self._turned:
            self._turned[self._block, part] = (self._state_turned_back(state, part),)
        return self._turned[self._block, part][0]

    def _state_turned_back(self, state: Tensor, part: str) -> Tensor:
        """The state of one or two branches where this pass' positions have it."""
        assert self.rotary is not None
        whole, half = self.rotary.turn(self.past.frames - self.past.origin, state.device)
        main, *camera = state.chunk(len(part.split()))
        turned = [rotate(main, whole[None], inverse=True)]
        for each in camera:  # half of whose channels are rotated, of values and of keys
            for _ in range(2):
                still, moving = each.transpose(-1, -2).chunk(2, -1)
                each = torch.cat([still, rotate(moving.contiguous(), half[None], inverse=True)], -1)
            turned.append(each)
        return torch.cat(turned)

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

    def _from_past(self, part: str) -> tuple[Tensor, ...]:
        """What a part of the block needs of the past; empty at the beginning."""
        return self.past.traces[self._block, part] if self.past.traces else ()

    def _leave(self, part: str, trace: Callable[[], tuple[Tensor, ...]]) -> None:
        if not torch.is_grad_enabled():  # a trace holds on to activations
            self._traces[part] = trace


def _joined(x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """These tokens of x (B, N, H, D)."""
    parts = [x[:, first:end] for first, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

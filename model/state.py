"""What a video that is made chunk by chunk keeps of the chunks before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Traces = Mapping[tuple[int, str], tuple[Tensor, ...]]  # by block and part
KEYS = "keys", "camera keys"  # the parts of which keys and values are kept


@dataclass(frozen=True)
class StreamState:
    """The past of some clips, as one network sees it; an empty one is the beginning. Nothing changes one.

    frames: latent frames so far. traces: what each part of the network that looks at other frames needs of the past, by
    its block's number and its name: a GDN's states, a convolution's last frames, or the keys and values of the chunks
    in `kept`. Positions count from the frame that a pass begins with: `origin` is that of the last one, which states
    are of; kept: (chunk, frames, origin) of those whose keys are kept, an origin for each clip where they differ.
    """

    frames: int = 0
    chunks: int = 0
    origin: int = 0
    kept: tuple[tuple[int, int, int | tuple[int, ...]], ...] = ()
    traces: Traces = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, each of which has memory of its own."""
        return sum(tensor.nbytes for trace in self.traces.values() for tensor in trace)

    def place(self, window: int | None) -> tuple:
        """What a network that sees `window` chunks before its own notices of where in a video this is; pasts of which
        it is equal, and that are of as many clips, can go on together.
        """
        return self._next(window), self.frames - self.origin, tuple(each[:2] for each in self._relative(window))

    def _next(self, window: int | None) -> int:
        return self.chunks if window is None else min(self.chunks, window + 1)

    def _relative(self, window: int | None) -> list[tuple[int, int, int | tuple[int, ...]]]:
        """`kept` as if the next chunk's number were `_next`, and its first frame the first of all."""
        later = self.chunks - self._next(window)
        return [(max(0, chunk - later), size, self._ago(origin)) for chunk, size, origin in self.kept]

    def _ago(self, origin: int | tuple[int, ...]) -> int | tuple[int, ...]:
        return tuple(each - self.frames for each in origin) if isinstance(origin, tuple) else origin - self.frames

    def to(self, device: torch.device | str) -> StreamState:
        traces = {part: tuple(tensor.to(device) for tensor in trace) for part, trace in self.traces.items()}
        return replace(self, traces=traces)


def together(states: Sequence[StreamState], window: int | None) -> StreamState:
    """The pasts of several clips, one each and of equal places, as one past of all of them."""
    first = states[0]
    assert len({state.place(window) for state in states}) == 1, "these go on from unlike places"
    kept = tuple(
        (chunk, size, tuple(origin for _, _, origin in each))
        for (chunk, size, _), each in zip(
            first._relative(window), zip(*(state._relative(window) for state in states), strict=True), strict=True
        )
    )
    traces = {
        part: tuple(joined(each) for each in zip(*(state.traces[part] for state in states), strict=True))
        for part in first.traces
    }
    return StreamState(0, first._next(window), first.origin - first.frames, kept, traces)


def apart(after: StreamState, before: Sequence[StreamState]) -> list[StreamState]:
    """What the past of several clips became in a pass, for each of them, whose pasts were `before`."""
    found = []
    for clip, state in enumerate(before):
        kept = []
        for chunk, size, origin in after.kept:
            ago = after.frames - (origin[clip] if isinstance(origin, tuple) else origin)
            number = chunk and state.chunks + chunk - after.chunks + 1
            kept.append((number, size, state.frames + after.frames - ago))
        traces = {
            part: tuple(x.unflatten(0, (-1, len(before)))[:, clip].clone() for x in trace)
            for part, trace in after.traces.items()
        }
        frames, chunks = state.frames + after.frames, state.chunks + 1
        found.append(StreamState(frames, chunks, state.frames, tuple(kept), traces))
    return found


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one clip each, (G, ...) of groups such as branches or texts, as those of all: (G x clips, ...)."""
    return torch.stack(list(tensors), 1).flatten(0, 1)

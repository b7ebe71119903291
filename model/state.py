"""What a video that is made chunk by chunk keeps of the chunks before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamState:
    """The past of some clips, as one network sees it; an empty one is the beginning. Nothing changes one.

    frames: latent frames so far. traces: what each part of the network that looks at other frames needs of the past, by
    its block's number and its name: a GDN's states, a convolution's last frames, or the keys and values of the chunks
    in `kept`. Positions count from the frame that a pass begins with: `origin` is that of the last one, which states
    are of; kept: (chunk, frames, origin) of those whose keys are kept.
    """

    frames: int = 0
    chunks: int = 0
    origin: int = 0
    kept: tuple[tuple[int, int, int], ...] = ()
    traces: Mapping[tuple[int, str], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, each of which has memory of its own."""
        return sum(tensor.nbytes for trace in self.traces.values() for tensor in trace)

    def to(self, device: torch.device | str) -> StreamState:
        traces = {part: tuple(tensor.to(device) for tensor in trace) for part, trace in self.traces.items()}
        return replace(self, traces=traces)

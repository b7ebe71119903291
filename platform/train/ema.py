"""A moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """float32 average of the trainable parameters, kept on their device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that random weights are forgotten early.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._average = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._average, [p.detach().float() for p in self._parameters], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside the block, its own ones again after it."""
        own = [p.detach().clone() for p in self._parameters]
        _copy(self._parameters, self._average)
        try:
            yield
        finally:
            _copy(self._parameters, own)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self._average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        _copy(self._average, state["average"])


@torch.no_grad()
def _copy(targets: list, sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)

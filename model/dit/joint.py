"""Linear layers of the same inputs as one product: a GPU computes a large one faster than its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MULTIPLE = 64  # of outputs: kernels that read a part of them load 16 bytes at a time where rows lie so


class Joint(nn.Module):
    """x (..., C) to the outputs of all `layers`, one's after another's, and zeros up to a multiple of 64. Their weights
    become parts of one tensor, so nothing is held twice and what is loaded into a layer is seen here; with gradients
    each computes its own, without zeros.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self._layers = list(layers)  # which their owner registers
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        rest = -sum(len(layer.weight) for layer in layers) % _MULTIPLE
        weight = F.pad(torch.cat([layer.weight.detach() for layer in layers]), (0, 0, 0, rest))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", F.pad(torch.cat(biases).detach(), (0, rest)), persistent=False)
        self._tie()

    def _tie(self) -> None:
        first = 0
        for layer in self._layers:
            own = slice(first, first + len(layer.weight))
            layer.weight.data = self.weight[own]
            if layer.bias is not None:
                layer.bias.data = self.bias[own]
            first = own.stop

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Joint:
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return torch.cat([layer(x) for layer in self._layers], -1)
        return F.linear(x, self.weight, self.bias)

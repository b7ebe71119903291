"""Linear layers of the same inputs as one product: a GPU computes a large one faster than its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joint(nn.Module):
    """x (..., C) to the outputs (..., D) of all `layers`, one's after another's. Their weights become parts of one
    tensor, so nothing is held twice and what is loaded into a layer is seen here; with gradients each computes its own.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self._layers = list(layers)  # which their owner registers
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]), persistent=False)
        self.register_buffer("bias", torch.cat(biases).detach(), persistent=False)
        self._tie()

    def _tie(self) -> None:
        sizes = [len(layer.weight) for layer in self._layers]
        parts = zip(self._layers, self.weight.split(sizes), self.bias.split(sizes), strict=True)
        for layer, weight, bias in parts:
            layer.weight.data = weight
            if layer.bias is not None:
                layer.bias.data = bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Joint:
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return torch.cat([layer(x) for layer in self._layers], -1)
        return F.linear(x, self.weight, self.bias)

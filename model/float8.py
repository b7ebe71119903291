"""Networks whose large matrix products take factors in float8, for generation: fp8 as vLLM and torchao have it, a scale
for each token of the inputs and each output channel of the weights.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from longtake.kernels import float8
from longtake.kernels.float8 import Rounded, rounded

Quantization = Literal["fp8"]
QUANTIZATIONS = get_args(Quantization)

# Of a world model's blocks and a refiner's: what every token passes. What is computed once for many steps, the GDN's
# gates and what sums frames stay exact.
_LAYERS = re.compile(
    r"blocks\.\d+\.(attn\.(qkv|[qkv]_proj_cam|out_proj_cam|output_gate|proj)|cross_attn\.(q_linear|proj)"
    r"|mlp\.(inverted|point)_conv\.conv)"
    r"|.*transformer_blocks\.\d+\.(attn1\.to_([qkv]|out\.0)|attn2\.to_(q|out\.0)|ff\.net\.(0\.proj|2))"
)


class Float8Linear(nn.Module):
    """A linear layer, or a 1 x 1 convolution, with weights in float8: x (..., C), or x rounded, to (..., D), in the
    dtype that the weights had.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        values, scale = rounded(weight.detach().flatten(1))
        self.dtype = weight.dtype
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor | Rounded) -> Tensor:
        x = x if isinstance(x, Rounded) else rounded(x)
        return float8.linear(x, Rounded(self.weight, self.scale), self.bias, self.dtype)


def shared(x: Tensor, layer: nn.Module) -> Tensor | Rounded:
    """What several layers take that are like this one: x, rounded once where they would each round it."""
    return rounded(x) if isinstance(layer, Float8Linear) else x


def quantize(network: Any) -> None:
    """Replace the layers of a world model or a refiner whose products are large, once its weights are final and in
    their dtype: they can be neither trained nor saved afterwards.
    """
    for name, layer in list(network.named_modules()):
        if _LAYERS.fullmatch(name) and all(size % float8.CHANNELS == 0 for size in layer.weight.shape[:2]):
            network.set_submodule(name, Float8Linear(layer))


def check(device: str | torch.device) -> None:
    """ValueError where float8 is not multiplied."""
    if not float8.multiplies(torch.device(device)):
        raise ValueError("quantization fp8 needs a GPU of compute capability 8.9 (Ada) or above: leave it out here")

"""Networks whose large matrix products take factors in float8, for generation: fp8 as vLLM and torchao have it, a scale
for each token of the inputs and each output channel of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    r"blocks\.\d+\.(attn\.(out_proj_cam|proj)|cross_attn\.(q_linear|proj)|mlp\.(inverted|point)_conv\.conv)"
    r"|.*transformer_blocks\.\d+\.(attn1\.to_out\.0|attn2\.to_(q|out\.0)|ff\.net\.(0\.proj|2))"
)
# Those whose `joint` takes the place of several layers of the same inputs.
_JOINT = re.compile(r"blocks\.\d+\.attn|.*transformer_blocks\.\d+\.attn1")


class Float8Linear(nn.Module):
    """Linear layers, or 1 x 1 convolutions, of the same inputs, with weights in float8: x (..., C), or x rounded, to
    (..., D), one layer's outputs after another's, in the dtype that the weights had.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, *layers: Any):
        super().__init__()
        values, scale = rounded(torch.cat([layer.weight.detach().flatten(1) for layer in layers]))
        biases = [
            layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers
        ]
        self.dtype = layers[0].weight.dtype
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if all(layer.bias is None for layer in layers) else torch.cat(biases))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Follow a module to a device, and keep every dtype."""
        device = fn(self.scale).device
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))
        return self

    def forward(self, x: Tensor | Rounded) -> Tensor:
        x = x if isinstance(x, Rounded) else rounded(x)
        return float8.linear(x, Rounded(self.weight, self.scale), self.bias, self.dtype)


def quantize(network: Any) -> None:
    """Replace the layers of a world model or a refiner whose products are large, once its weights are final and in
    their dtype: they can be neither trained nor saved afterwards.
    """
    for name, module in list(network.named_modules()):
        if _LAYERS.fullmatch(name) and _fits(module):
            network.set_submodule(name, Float8Linear(module))
        elif _JOINT.fullmatch(name) and all(_fits(getattr(module, each)) for each in module.joined):
            module.joint = Float8Linear(*(getattr(module, each) for each in module.joined))
            for each in module.joined:
                setattr(module, each, None)


def _fits(layer: Any) -> bool:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"a {type(layer).__name__} cannot be rounded to float8: merge adapters before")
    return all(size % float8.CHANNELS == 0 for size in layer.weight.shape[:2])


def check(quantization: str | None, device: str | torch.device) -> None:
    """ValueError for a quantization that there is not, or not on this device."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization {quantization!r} must be one of {', '.join(QUANTIZATIONS)}, or left out")
    device = torch.device(device)
    if quantization and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here: choose the device cpu")
    if quantization and not float8.multiplies(device):
        raise ValueError("quantization fp8 needs a GPU of compute capability 8.9 (Ada) or above: leave it out here")

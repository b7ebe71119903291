"""Parts of a pipeline that are larger than the device: their blocks pass through it one after another."""

from __future__ import annotations

import torch
from torch import nn

from longtake.model.refiner import Refiner
from longtake.model.refiner.text import RefinerTextEncoder


def stream_blocks(part: nn.Module, device: torch.device) -> None:
    """Keep the weights of a refiner or its text encoder in the host's memory, from where a block comes to the device
    while the one before it computes; nothing else of the part is left on the host.
    """
    from diffusers.hooks import apply_group_offloading  # seconds of imports, of which most pipelines have no need

    ahead = device.type == "cuda"
    if isinstance(part, Refiner):
        apply_group_offloading(part.transformer, device, num_blocks_per_group=1, use_stream=ahead, non_blocking=ahead)
    elif isinstance(part, RefinerTextEncoder):
        apply_group_offloading(part.model, device, offload_type="leaf_level", use_stream=ahead, non_blocking=ahead)
        part.connectors.to(device)

"""Tensors on their way to a device that is busy."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x, of the CPU, on the device. From memory that is not pinned a CPU sends nothing before a GPU has done all that
    it was given.
    """
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)

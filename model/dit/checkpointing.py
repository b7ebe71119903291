"""Activation checkpointing that keeps what attention over the clip computes: its work grows with the square of what it
takes. Everything else of a block is computed once more in the backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpointed(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """block(*args) of a block that draws no random numbers."""
    # torch's own selective checkpointing wants all operators to come again in the same order, which ZeRO's do not.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_attention)


def _keeping_attention() -> tuple[_Attention, _Attention]:
    kept: deque = deque()
    return _Attention(kept, again=False), _Attention(kept, again=True)


class _Attention(TorchDispatchMode):
    """Puts aside what attention computes, or gives it back."""

    def __init__(self, kept: deque, again: bool):
        super().__init__()
        self.kept, self.again = kept, again

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        of_clip = operator in _ATTENTIONS and args[1].shape[2] >= args[0].shape[2]  # a text has fewer keys
        if of_clip and self.again:
            return self.kept.popleft()
        result = operator(*args, **kwargs or {})
        if of_clip:
            self.kept.append(tuple(part.detach() if isinstance(part, Tensor) else part for part in result))
        return result

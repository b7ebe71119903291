"""Activation checkpointing that keeps what attention over the clip computes: its work grows with the square of what it
takes. Everything else of a block is computed once more in the backward pass, but for what is wrapped in `once`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

_T = TypeVar("_T")
_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpointed(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """block(*args) of a block that draws no random numbers."""
    # torch's own selective checkpointing wants all operators to come again in the same order, which ZeRO's do not.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping)


def once(compute: Callable[[], _T]) -> _T:
    """compute(), of tensors without gradients; a checkpointed block keeps them for when it is computed once more."""
    keeping = next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Keeping)), None)
    return keeping.given(compute) if keeping else compute()


def _keeping() -> tuple[_Keeping, _Keeping]:
    kept: deque = deque()
    return _Keeping(kept, again=False), _Keeping(kept, again=True)


class _Keeping(TorchDispatchMode):
    """Puts aside what attention computes, or gives it back."""

    def __init__(self, kept: deque, again: bool):
        super().__init__()
        self.kept, self.again = kept, again

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        of_clip = operator in _ATTENTIONS and args[1].shape[2] >= args[0].shape[2]  # a text has fewer keys
        if of_clip:
            return self.given(lambda: operator(*args, **kwargs or {}))
        return operator(*args, **kwargs or {})

    def given(self, compute: Callable[[], _T]) -> _T:
        if self.again:
            return self.kept.popleft()
        result = compute()
        self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result

"""Exact attention over tokens on several ranks: keys and values go round the ring of ranks, queries stay.

A rank attends to the keys and values that it holds while the ones before them arrive, and merges what it found by the
logarithms of the softmax's denominators. Backwards, keys and values go round once more, and the gradients that each
rank adds to theirs follow one step behind (Ring Attention, arXiv 2310.01889).

Legend: B batch, N tokens of this rank, M of the rank whose keys are here, H heads, D channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.platform.parallel.peers import Peers

_aten = torch.ops.aten


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, tokens: Sequence[int], scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.peers, ctx.tokens, ctx.scale = peers, tokens, scale
        out, lse = _attended_nothing(q)
        own = block = torch.stack([k, v])
        for step in range(peers.count):
            arriving = _Passing(peers, tokens, block, step) if step + 1 < peers.count else None
            part, part_lse, random_state = _attend(q, block, scale)
            out, lse = _merge(out, lse, part, part_lse)
            block = arriving.wait() if arriving else block
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse, *random_state)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        peers, tokens = ctx.peers, ctx.tokens
        q, block, *found = ctx.saved_tensors
        grad_q, own, following = torch.zeros_like(q, dtype=torch.float32), torch.zeros(()), None
        for step in range(peers.count):
            arriving = _Passing(peers, tokens, block, step) if step + 1 < peers.count else None
            part_q, part = _attend_backward(gradient.contiguous(), q, block, *found, scale=ctx.scale)
            grad_q += part_q
            if step == 0:
                own = part
            else:
                part = part + following.wait() if following else part
                following = _Passing(peers, tokens, part, step)  # the last rank to hold a block sends them home
            block = arriving.wait() if arriving else block
        grad_k, grad_v = (own + following.wait() if following else own).to(q.dtype)
        return None, None, None, grad_q.to(q.dtype), grad_k, grad_v


_ring_attention: Any = torch.compiler.disable(_RingAttention.apply)  # compiled blocks are cut here


def ring_attention(peers: Peers, tokens: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v over the tokens of all peers, of which rank r holds tokens[r]: (B, N, H, D) each.

    Computed in the dtype of q, k and v; merged, and the gradients summed, in float32. Collective, forwards and
    backwards.
    """
    return _ring_attention(peers, tokens, scale, q, k, v)


class _Passing:
    """A block (2, B, M, H, D) on its way to the next rank, and the one of the rank before on its way here.

    At a step the ranks hold the block of the rank that many places before them.
    """

    def __init__(self, peers: Peers, tokens: Sequence[int], block: Tensor, step: int):
        before, after = (peers.rank - 1) % peers.count, (peers.rank + 1) % peers.count
        shape = list(block.shape)
        shape[2] = tokens[(before - step) % peers.count]
        self.block, self.arriving = block, block.new_empty(shape)
        self.transfers = peers.start("attention", [(after, block)], [(before, self.arriving)])

    def wait(self) -> Tensor:
        for transfer in self.transfers:
            transfer.wait()
        return self.arriving


def _attended_nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32)
    return torch.zeros_like(q, dtype=torch.float32), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, (B, N, H, D), as attention to both; lse (B, H, N) of each set's scores."""
    both = torch.logaddexp(lse, part_lse)
    ours, theirs = ((each - both).exp().transpose(1, 2)[..., None] for each in (lse, part_lse))
    return out * ours + part * theirs, both


def _attend(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Attention of q (B, N, H, D) to kv (2, B, M, H, D), the log-sum-exp of its scores (B, H, N) in float32, and the
    state of a random generator that the backward pass asks for and does not use.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, *kv))
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        state = ()
    elif q.dtype == torch.float32:
        out, lse, *state = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        lse = lse[..., : q.shape[2]]  # it is padded for its own backward pass
    else:
        out, lse, _, _, _, _, *state, _ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.transpose(1, 2), lse, tuple(state)


def _attend_backward(
    gradient: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, *state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What these keys and values add to the gradient of q, and their own gradients, (2, B, M, H, D), in float32.

    With `out` and `lse` of attention to all keys, the weights of these ones are their share of the whole.
    """
    gradient, q, k, v, out = (tensor.transpose(1, 2) for tensor in (gradient, q, *kv, out))
    given = gradient, q, k, v
    if q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, out, lse, 0.0, False, scale=scale)
    elif q.dtype == torch.float32:
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        wanted = [True, True, True, False]
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *given, None, out, lse, *state, 0.0, wanted, scale=scale
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_backward(
            *given, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *state, scale=scale
        )
    grad_q, grad_k, grad_v = (tensor.transpose(1, 2).float() for tensor in found[:3])
    return grad_q, torch.stack([grad_k, grad_v])

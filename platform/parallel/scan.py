"""The GDN's scan in both directions over frames that lie on several ranks, as it would be on one.

A rank first carries what it knows nothing of, the identity beside zeros, through its stretch: the stretch as one map.
These maps go to the ranks that follow in either direction; applied one after another they are the states with which a
rank then scans its own frames. Backwards the same happens to the states' gradients, with the transposed maps.

Legend: B batch, T frames of this rank, H heads, V rows of a state, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtake.kernels.gdn import carry, to_maps
from longtake.model.dit.checkpointing import once
from longtake.platform.parallel.peers import Peers


class _SharedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, transition: Tensor, increment: Tensor) -> Tensor:
        through, start = once(lambda: _stretch(peers, transition, increment))
        states, _ = carry(transition, increment, start)
        ctx.peers = peers
        ctx.save_for_backward(transition, through, start, *states)
        return states[0] + states[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> Any:  # type: ignore[override]
        transition, through, start, *states = ctx.saved_tensors
        _, ends = carry(transition, d_states, torch.zeros_like(start), adjoint=True, keep=False)
        # Gradients pass the stretches the other way round.
        flipped = _folded(ctx.peers, through.transpose(-1, -2).flip(0), ends.flip(0))
        adjoints, _ = carry(transition, d_states, flipped.flip(0), adjoint=True)
        return None, *to_maps(start, states, adjoints)


def _stretch(peers: Peers, transition: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank's stretch applies to a state that passes it, (2, B, H, D, D), and its scans' starts."""
    rows, d = increment.shape[-2:]
    identity = torch.eye(rows + d, d, device=increment.device).roll(rows, 0)
    _, maps = carry(transition, increment, identity.expand(2, len(increment), increment.shape[2], -1, -1), keep=False)
    through = maps[..., rows:, :].contiguous()
    return through, _folded(peers, through, maps[..., :rows, :])


def _folded(peers: Peers, through: Tensor, since: Tensor) -> Tensor:
    """States (2, B, H, V, D) with which this rank's scans start: forwards what the earlier ranks' maps make of zeros,
    backwards what the later ranks' do. The own maps: through (2, B, H, D, D), since (2, B, H, V, D).
    """
    rows = since.shape[-2]
    forwards, backwards = torch.cat([since, through], dim=-2).unbind()
    maps = forwards.new_empty(peers.count, *forwards.shape)
    gives = [[forwards if rank > peers.rank else backwards] for rank in range(peers.count)]
    peers.swap("states", gives, [[each] for each in maps])
    return torch.stack(
        [_applied(maps[: peers.rank], since[0], rows), _applied(maps[peers.rank + 1 :].flip(0), since[1], rows)]
    )


def _applied(maps: Tensor, like: Tensor, rows: int) -> Tensor:
    state = torch.zeros_like(like)
    for each in maps:
        state = state @ each[..., rows:, :] + each[..., :rows, :]
    return state


_shared_scan: Any = torch.compiler.disable(_SharedScan.apply)  # compiled blocks are cut here


def shared_scan(peers: Peers, transition: Tensor, increment: Tensor) -> Tensor:
    """`bidirectional_states` of the frames of all peers, of which transition (B, T, H, D, D) and increment
    (B, T, H, V, D) are this rank's: float32 (B, T, H, V, D). Collective, forwards and backwards.
    """
    return _shared_scan(peers, transition, increment)

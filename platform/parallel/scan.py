"""The GDN's scan in both directions over frames that lie on several ranks, as it would be on one.

A rank at one of the clip's ends knows that a scan starts there from zeros: it makes that scan, and gives the state that
is left at its end. The others carry what they know nothing of, the identity beside zeros, through their stretch, and
give that map. States and maps go to the ranks that follow in either direction; applied one after another they are what
a rank's own scans start from. Backwards the same happens to the states' gradients, with the transposed maps.

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
        start, states, through = _scanned(peers, transition, increment)
        ctx.peers = peers
        ctx.save_for_backward(transition, through, start, *states)
        return states[0] + states[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> Any:  # type: ignore[override]
        transition, through, start, *states = ctx.saved_tensors
        _, adjoints, _ = _scanned(ctx.peers, transition, d_states, through)
        return None, *to_maps(start, states, adjoints)


def _scanned(
    peers: Peers, transition: Tensor, increment: Tensor, through: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The two scans' starts (2, B, H, V, D) and states, and what this rank's stretch makes of a state that passes it,
    (2, B, H, D, D), which is zeros at the clip's ends, where nobody asks. With the latter, the adjoint scans.
    """
    adjoint, (b, _, h, rows, d) = through is not None, increment.shape
    since = increment.new_zeros(2, b, h, rows, d)
    known, states = _known(peers, adjoint), []
    if known is not None:
        states, end = carry(transition, increment, since[:1], adjoint, only=known)
        since[known] = end[0]
    elif adjoint:
        _, since = carry(transition, increment, since, adjoint, keep=False)
    else:
        identity = torch.eye(rows + d, d, device=increment.device).roll(rows, 0).expand(2, b, h, -1, -1)
        _, maps = once(lambda: carry(transition, increment, identity, keep=False))
        since, through = maps[..., :rows, :], maps[..., rows:, :]
    if through is None:
        through = increment.new_zeros(2, b, h, d, d)
    start = once(lambda: _folded(peers, through, since, adjoint))
    if known is None:
        states, _ = carry(transition, increment, start, adjoint)
    else:
        other, _ = carry(transition, increment, start[1 - known :][:1], adjoint, only=1 - known)
        states = states + other if known == 0 else other + states
    return start, states, through


def _known(peers: Peers, adjoint: bool) -> int | None:
    """The direction whose scan starts on this rank, if one does: 0 forwards, 1 backwards."""
    if peers.rank not in (0, peers.count - 1):
        return None
    return int((peers.rank == 0) == adjoint)


def _folded(peers: Peers, through: Tensor, since: Tensor, adjoint: bool) -> Tensor:
    """States (2, B, H, V, D) with which this rank's scans start: forwards what the earlier ranks' maps make of zeros,
    backwards what the later ranks' do. The own maps: through (2, B, H, D, D), since (2, B, H, V, D).
    """
    if adjoint:  # gradients pass the stretches the other way round
        return _folded(peers, through.transpose(-1, -2).flip(0), since.flip(0), False).flip(0)
    forwards, backwards = torch.cat([since, through], dim=-2).unbind()
    maps = forwards.new_empty(peers.count, *forwards.shape)
    gives = [[forwards if rank > peers.rank else backwards] for rank in range(peers.count)]
    peers.swap("states", gives, [[each] for each in maps])
    return torch.stack(
        [_applied(maps[: peers.rank], since[0]), _applied(maps[peers.rank + 1 :].flip(0), since[1])],
    )


def _applied(maps: Tensor, like: Tensor) -> Tensor:
    """The maps (ranks, B, H, V + D, D), one after another, of a state of zeros."""
    state, rows = torch.zeros_like(like), like.shape[-2]
    for each in maps:
        state = state @ each[..., rows:, :] + each[..., :rows, :]
    return state


_shared_scan: Any = torch.compiler.disable(_SharedScan.apply)  # compiled blocks are cut here


def shared_scan(peers: Peers, transition: Tensor, increment: Tensor) -> Tensor:
    """`bidirectional_states` of the frames of all peers, of which transition (B, T, H, D, D) and increment
    (B, T, H, V, D) are this rank's: float32 (B, T, H, V, D). Collective, forwards and backwards.
    """
    return _shared_scan(peers, transition, increment)

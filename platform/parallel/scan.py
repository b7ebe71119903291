"""The GDN's scan in both directions over frames that lie on several ranks, as it would be on one.

The rank at which a scan begins knows that it starts from zeros: it makes that scan, and gives the state that is left
at its end. The others carry what they know nothing of, the identity beside zeros, through their stretch, and give that
map. States and maps go to the ranks that a scan passes later; applied one after another they are what a rank's own scan
starts from. Backwards the same happens to the states' gradients, with the transposed maps, the other way round.

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
    def forward(ctx: Any, peers: Peers, both: bool, transition: Tensor, increment: Tensor) -> Tensor:
        start, states, through = _scanned(peers, both, transition, increment)
        ctx.peers, ctx.both = peers, both
        ctx.save_for_backward(transition, through, start, *states)
        return states[0] + states[1] if both else states[0].clone()  # what is saved may not be what is given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> Any:  # type: ignore[override]
        transition, through, start, *states = ctx.saved_tensors
        _, adjoints, _ = _scanned(ctx.peers, ctx.both, transition, d_states, through)
        if not ctx.both:
            nothing = torch.zeros_like(states[0])
            states, adjoints = [*states, nothing], [*adjoints, nothing]
        return None, None, *to_maps(start, states, adjoints)


def _scanned(
    peers: Peers, both: bool, transition: Tensor, increment: Tensor, through: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of each scan, forwards and if `both` backwards: its start (1 or 2, B, H, V, D) and states, and what this rank's
    stretch makes of a state that passes it, (1 or 2, B, H, D, D), which is zeros where nobody asks. With the latter,
    the adjoint scans.
    """
    adjoint, (b, _, h, rows, d) = through is not None, increment.shape
    scans = range(2 if both else 1)
    # Each scan passes the ranks in order or in reverse, its adjoint the other way round.
    place = [peers.rank if (scan == 0) != adjoint else peers.count - 1 - peers.rank for scan in scans]
    since = increment.new_zeros(len(scans), b, h, rows, d)
    states: dict[int, Tensor] = {}

    def carried(which: list[int], start: Tensor, keep: bool = True) -> tuple[list[Tensor], Tensor]:
        only = None if len(which) == 2 else which[0]
        return carry(transition, increment, start, adjoint, keep, only)

    for scan in scans:
        if place[scan] == 0:  # it begins here, from zeros
            (states[scan],), since[scan : scan + 1] = carried([scan], since[scan : scan + 1].clone())
    asked = [scan for scan in scans if 0 < place[scan] < peers.count - 1]
    if through is None:
        through = increment.new_zeros(len(scans), b, h, d, d)
        if asked:
            identity = torch.eye(rows + d, d, device=increment.device).roll(rows, 0)
            start = identity.expand(len(asked), b, h, -1, -1)
            _, maps = once(lambda: carried(asked, start, keep=False))
            since[_run(asked)], through[_run(asked)] = maps[..., :rows, :], maps[..., rows:, :]
    elif asked:
        since[_run(asked)] = carried(asked, since[_run(asked)].clone(), keep=False)[1]
    start = once(lambda: _folded(peers, through, since, adjoint))
    if going_on := [scan for scan in scans if place[scan] > 0]:
        states |= zip(going_on, carried(going_on, start[_run(going_on)])[0], strict=True)
    return start, [states[scan] for scan in scans], through


def _run(scans: list[int]) -> slice:
    return slice(scans[0], scans[-1] + 1)


def _folded(peers: Peers, through: Tensor, since: Tensor, adjoint: bool) -> Tensor:
    """States with which this rank's scans start: what the maps of the ranks before it, in each one's order, make of
    zeros. The own maps: through (1 or 2, B, H, D, D), since (1 or 2, B, H, V, D).
    """
    if adjoint:
        through = through.transpose(-1, -2)
    maps = torch.cat([since, through], dim=-2)
    # A scan's maps go to the ranks that it passes later: with adjoint scans, the first one's to earlier ranks.
    later, earlier = (maps[1:], maps[:1]) if adjoint else (maps[:1], maps[1:])
    ranks = range(peers.count)
    gives = [[*(later if rank > peers.rank else earlier if rank < peers.rank else [])] for rank in ranks]
    counts = [len(earlier if rank > peers.rank else later if rank < peers.rank else []) for rank in ranks]
    takes = [[maps.new_empty(maps.shape[1:]) for _ in range(count)] for count in counts]
    peers.swap("states", gives, takes)
    states = torch.zeros_like(since)
    for scan in range(len(since)):
        forwards = (scan == 0) != adjoint
        before = takes[: peers.rank] if forwards else takes[: peers.rank : -1]
        for (each,) in before:
            states[scan] = _applied(each, states[scan])
    return states


def _applied(each: Tensor, state: Tensor) -> Tensor:
    """The map (B, H, V + D, D) of a state (B, H, V, D)."""
    rows = state.shape[-2]
    return state @ each[..., rows:, :] + each[..., :rows, :]


_shared_scan: Any = torch.compiler.disable(_SharedScan.apply)  # compiled blocks are cut here


def shared_scan(peers: Peers, transition: Tensor, increment: Tensor, both: bool = True) -> Tensor:
    """`bidirectional_states` of the frames of all peers, of which transition (B, T, H, D, D) and increment
    (B, T, H, V, D) are this rank's: float32 (B, T, H, V, D). Without `both`, the scan forwards alone, `scan_states`.
    Collective, forwards and backwards.
    """
    return _shared_scan(peers, both, transition, increment)

"""Frame-wise Gated DeltaNet: linear attention whose state moves once a frame.

The operator in its steps, each computed by Triton where `launch.fused` says so, else by its definition in
`reference`, which documents shapes. Under Triton, queries, keys and values keep their dtype, of 16 bits, and are
multiplied in it; states are float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.kernels.gdn import reference
from longtake.kernels.launch import apply, fused


def gates(
    projected: Tensor, frames: int, dt_bias: Tensor, a_log: Tensor, inflation: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.gates`; Triton computes it where nobody wants a gradient."""
    if fused(projected) and not torch.is_grad_enabled():
        from longtake.kernels.gdn import triton_gates

        with torch.cuda.device_of(projected):
            return triton_gates.gates(projected, frames, dt_bias, a_log, inflation)
    return reference.gates(projected, frames, dt_bias, a_log, inflation)


def frame_maps(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Each frame as a map of the state, see `reference.frame_maps`."""
    return maps_of_branches([(k, v, beta)], decay)


def maps_of_branches(branches: Sequence[tuple[Tensor, Tensor, Tensor]], decay: Tensor) -> tuple[Tensor, Tensor]:
    """`frame_maps` of each branch's (k, v, beta), which share the decay, one after another along the batch."""
    if all(fused(*branch) and branch[0].element_size() == 2 for branch in branches):
        from longtake.kernels.gdn.triton_maps import FrameMaps

        return apply(FrameMaps, decay, *(tensor for branch in branches for tensor in branch))
    maps = [reference.frame_maps(*branch, decay) for branch in branches]
    if len(maps) == 1:
        return maps[0]
    transitions, increments = zip(*maps, strict=True)
    return torch.cat(transitions), torch.cat(increments)


def every_map(
    branches: Sequence[tuple[Tensor, Tensor, Tensor]], plain: Tensor, decay: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`maps_of_branches`, and `frame_maps` of the normaliser: the first branch's keys before they were rotated,
    `plain`, and one value channel that is 1.
    """
    parts = plain, *(tensor for branch in branches for tensor in branch)
    square = all(v.shape[-1] == plain.shape[-1] for _, v, _ in branches)
    if fused(*parts) and plain.element_size() == 2 and square and not torch.is_grad_enabled():
        from longtake.kernels.gdn import triton_maps

        with torch.cuda.device_of(plain):
            return triton_maps.every_map(branches, plain, decay)
    return maps_of_branches(branches, decay), frame_maps(plain, torch.ones_like(plain[..., :1]), branches[0][2], decay)


def scan_states(transition: Tensor, increment: Tensor, state: Tensor | None = None) -> Tensor:
    """The state after every frame, see `reference.scan_states`."""
    if fused(transition, increment):
        from longtake.kernels.gdn.triton_scan import ScanStates

        state = torch.zeros_like(increment[:, 0]) if state is None else state
        return apply(ScanStates, transition, increment, state)[0]
    return reference.scan_states(transition, increment, state)


def bidirectional_states(transition: Tensor, increment: Tensor, state: Tensor | None = None) -> Tensor:
    """What every frame reads after a scan in both directions, see `reference.bidirectional_states`."""
    return every_state((transition, increment, state))[0]


def every_state(*scans: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
    """`bidirectional_states` of one scan or two, whose clips may differ in number, and increments in their rows."""
    if not all(fused(*scan[:2]) for scan in scans):
        return [reference.bidirectional_states(*scan) for scan in scans]
    from longtake.kernels.gdn.triton_scan import BidirectionalStates, summed

    if torch.is_grad_enabled():
        return [apply(BidirectionalStates, *scan) for scan in scans]
    with torch.cuda.device_of(scans[0][0]):
        return summed(*scans)


def carry(
    transition: Tensor,
    increment: Tensor,
    start: Tensor,
    adjoint: bool = False,
    keep: bool = True,
    only: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Both scans with their starts and ends, for who has a backward pass of their own: see `reference.carry`."""
    with torch.cuda.device_of(transition):
        return _scans(transition).carry(transition, increment, start, adjoint, keep, only)


def to_maps(start: Tensor, states: Sequence[Tensor], adjoints: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients that go with `carry`: see `reference.to_maps`."""
    with torch.cuda.device_of(start):
        return _scans(start).to_maps(start, states, adjoints)


def _scans(x: Tensor) -> Any:
    if not fused(x):
        return reference
    from longtake.kernels.gdn import triton_scan

    return triton_scan


def read(
    q: Tensor, states: Tensor, plain: Tensor | None = None, mass: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """The queries' outputs, see `reference.read`; under Triton in the queries' dtype."""
    if fused(q, states) and q.element_size() == 2:
        from longtake.kernels.gdn.triton_read import ReadStates

        return apply(ReadStates, q, states, plain, mass, eps)
    return reference.read(q, states, plain, mass, eps)


def read_both(
    main: tuple[Tensor, Tensor, Tensor, Tensor], q: Tensor, states: Tensor, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """`read` of the main branch (q, states, plain, mass) and of the camera's, which has no normaliser."""
    if fused(*main, q, states) and q.element_size() == 2 and not torch.is_grad_enabled():
        from longtake.kernels.gdn import triton_read

        with torch.cuda.device_of(q):
            return triton_read.read_both(main, q, states, eps)
    return read(*main, eps), read(q, states)

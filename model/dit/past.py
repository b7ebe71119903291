"""The past of a stream where the positions of its next pass have it.

Positions count from the first frame of a pass. Rotary ones tell how far a key is from its query and nothing else, so
what is kept is turned back by the frames between: a video may go on past the positions that the network was trained
with, the first chunk staying as far away as the furthest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.ucpe import encode
from longtake.kernels.ucpe.reference import rotate
from longtake.model.dit.positions import RotaryTable
from longtake.model.state import KEYS, StreamState, Traces

_ROTATED = "main", "main camera"  # states by keys that are rotated


def seen_from(past: StreamState, frames: int, rotary: RotaryTable | None) -> Traces:
    """The traces of `past` as a pass over the `frames` latent frames after it reads them; rotary: the network's.

    Keys and values are followed by room for the pass' own. In one order, whatever order they came in: passes are
    replayed by it.
    """
    found = dict(sorted(past.traces.items()))
    for part in KEYS:
        if blocks := [block for block, its in past.traces if its == part]:
            assert rotary is not None
            keys = past.traces[blocks[0], part][0]
            area, unmoved = keys.shape[1] // sum(size for _, size, _ in past.kept), None
            if part != "keys":
                unmoved = torch.eye(4, device=keys.device).expand(1, keys.shape[1], 4, 4).contiguous()
            turns = _turns(past, part, area, rotary, frames, keys.device)
            found |= {(block, part): _keys(past.traces[block, part], turns, unmoved, area * frames) for block in blocks}
    for part in _ROTATED:
        if blocks := [block for block, its in past.traces if its == part]:
            assert rotary is not None
            states = torch.stack([past.traces[block, part][0] for block in blocks])
            states = _state(states, part, *rotary.turn(past.frames - past.origin, states.device))
            found |= {(block, part): (state,) for block, state in zip(blocks, states, strict=True)}
    return found


def _turns(
    past: StreamState, part: str, area: int, rotary: RotaryTable, frames: int, device: torch.device
) -> list[Tensor]:
    """For each clip how far its keys are turned back, the further the longer ago they are, as `encode` takes it."""
    clips = max((len(origin) for *_, origin in past.kept if isinstance(origin, tuple)), default=1)
    found = []
    for clip in range(clips):
        turns = []
        for _, size, origin in past.kept:
            since = origin[clip] if isinstance(origin, tuple) else origin
            ago = min(past.frames - since, rotary.max_positions - frames)
            turns.append(rotary.turn(ago, device)[part != "keys"].expand(area * size, -1, -1))
        found.append(torch.cat(turns))
    return found


def _keys(trace: tuple[Tensor, ...], turns: list[Tensor], unmoved: Tensor | None, room: int) -> tuple[Tensor, ...]:
    """Keys and values of clips, and room for so many tokens'. unmoved: a camera's matrices that change nothing; its
    values are rotated too.
    """
    known, clips = trace[0].shape[1], len(turns)
    rooms = tuple(x.new_empty(x.shape[0], known + room, *x.shape[2:]) for x in trace)
    for clip, back in enumerate(turns):
        k, v = (x[clip::clips] for x in trace)
        to_k, to_v = (x[clip::clips, :known] for x in rooms)
        encode(k, back, matrix=unmoved, inverse_rope=True, into=to_k)
        if unmoved is None:
            to_v.copy_(v)
        else:
            encode(v, back, matrix=unmoved, inverse_rope=True, into=to_v)
    return rooms


def _state(states: Tensor, part: str, whole: Tensor, half: Tensor) -> Tensor:
    """Of one or two branches of GDNs (blocks, branches B, H, V, D), turned back by the main branch's and the camera's
    rotation.
    """
    main, *camera = states.chunk(len(part.split()), 1)
    turned = [rotate(main, whole[None], inverse=True)]
    for each in camera:  # half of whose channels are rotated, of values and of keys
        for _ in range(2):
            still, moving = each.transpose(-1, -2).chunk(2, -1)
            each = torch.cat([still, rotate(moving.contiguous(), half[None], inverse=True)], -1)
        turned.append(each)
    return torch.cat(turned, 1)

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

    Keys and values are followed by room for the pass' own.
    """
    found = {}
    for (block, part), trace in past.traces.items():
        turned = trace
        if part in KEYS:
            assert rotary is not None
            turned = _keys(past, trace, part, frames, rotary)
        elif part in _ROTATED:
            assert rotary is not None
            turned = (_state(trace[0], part, *rotary.turn(past.frames - past.origin, trace[0].device)),)
        found[block, part] = turned
    return found


def _keys(
    past: StreamState, trace: tuple[Tensor, ...], part: str, frames: int, rotary: RotaryTable
) -> tuple[Tensor, ...]:
    """Each clip's as far as they are long ago; the camera's values are rotated too."""
    known, area = trace[0].shape[1], trace[0].shape[1] // sum(size for _, size, _ in past.kept)
    rooms = tuple(x.new_empty(x.shape[0], known + area * frames, *x.shape[2:]) for x in trace)
    clips = max((len(origin) for *_, origin in past.kept if isinstance(origin, tuple)), default=1)
    for clip in range(clips):
        k, v = (x[clip::clips] for x in trace)
        to_k, to_v = (x[clip::clips, :known] for x in rooms)
        turns = []
        for _, size, origin in past.kept:
            since = origin[clip] if isinstance(origin, tuple) else origin
            ago = min(past.frames - since, rotary.max_positions - frames)
            turns.append(rotary.turn(ago, k.device)[part != "keys"].expand(area * size, -1, -1))
        back, unmoved = torch.cat(turns), None
        if part == "keys":
            to_v.copy_(v)
        else:
            unmoved = torch.eye(4, device=k.device).expand(1, known, 4, 4).contiguous()
            encode(v, back, matrix=unmoved, inverse_rope=True, into=to_v)
        encode(k, back, matrix=unmoved, inverse_rope=True, into=to_k)
    return rooms


def _state(state: Tensor, part: str, whole: Tensor, half: Tensor) -> Tensor:
    """Of one or two branches of a GDN, turned back by the main branch's and the camera's rotation."""
    main, *camera = state.chunk(len(part.split()))
    turned = [rotate(main, whole[None], inverse=True)]
    for each in camera:  # half of whose channels are rotated, of values and of keys
        for _ in range(2):
            still, moving = each.transpose(-1, -2).chunk(2, -1)
            each = torch.cat([still, rotate(moving.contiguous(), half[None], inverse=True)], -1)
        turned.append(each)
    return torch.cat(turned)

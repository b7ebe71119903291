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
from longtake.model.state import KEYS, StreamState, Traces, joined

_ROTATED = "main", "main camera"  # states by keys that are rotated


def seen_from(past: StreamState, frames: int, rotary: RotaryTable | None) -> Traces:
    """The traces of `past` as a pass over the `frames` latent frames after it reads them; rotary: the network's.

    Keys and values are followed by room for the pass' own.
    """
    found = {}
    for (block, part), trace in past.traces.items():
        turned = _turned(past, trace, part, frames, rotary)
        if part in KEYS:
            area = trace[0].shape[1] // sum(size for _, size, _ in past.kept)
            turned = tuple(_with_room(x, area * frames) for x in turned)
        found[block, part] = turned
    return found


def _with_room(x: Tensor, more: int) -> Tensor:
    whole = x.new_empty(x.shape[0], x.shape[1] + more, *x.shape[2:])
    whole[:, : x.shape[1]] = x
    return whole


def _turned(
    past: StreamState, trace: tuple[Tensor, ...], part: str, frames: int, rotary: RotaryTable | None
) -> tuple[Tensor, ...]:
    if part in _ROTATED:
        assert rotary is not None
        return (_state(trace[0], part, *rotary.turn(past.frames - past.origin, trace[0].device)),)
    if part not in KEYS:
        return trace
    assert rotary is not None
    clips = max((len(origin) for *_, origin in past.kept if isinstance(origin, tuple)), default=1)
    alone = zip(*(x.unflatten(0, (-1, clips)).unbind(1) for x in trace), strict=True)
    turned = [_keys(past, k, v, part, frames, rotary, clip) for clip, (k, v) in enumerate(alone)]
    return tuple(joined(each) for each in zip(*turned, strict=True))


def _keys(
    past: StreamState, k: Tensor, v: Tensor, part: str, frames: int, rotary: RotaryTable, clip: int
) -> tuple[Tensor, Tensor]:
    """Of one of the clips, as far as it is long ago; the camera's values are rotated too."""
    camera = part != "keys"
    area = k.shape[1] // sum(size for _, size, _ in past.kept)
    turns = []
    for _, size, origin in past.kept:
        since = origin[clip] if isinstance(origin, tuple) else origin
        ago = min(past.frames - since, rotary.max_positions - frames)
        turns.append(rotary.turn(ago, k.device)[camera].expand(area * size, -1, -1))
    back, unmoved = torch.cat(turns), None
    if camera:
        unmoved = torch.eye(4, device=k.device).expand(1, k.shape[1], 4, 4).contiguous()
        v = encode(v, back, matrix=unmoved, inverse_rope=True)[0].to(v.dtype)
    return encode(k, back, matrix=unmoved, inverse_rope=True)[0].to(k.dtype), v


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

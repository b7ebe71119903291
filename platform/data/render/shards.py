"""The work of rendering a store, cut into shards that processes render on their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from longtake.platform.data.clip import Clip
from longtake.platform.data.render import mujoco_rooms, vizdoom_worlds
from longtake.platform.data.render.paths import NoStart
from longtake.platform.data.store import ClipStore

Source = Literal["vizdoom", "mujoco", "both"]
_SHARD_FRAMES = 2000  # some 60 MB
_ROOMS_SHARE = 8  # of the clips of both sources, one in eight shows a room


@dataclass(frozen=True)
class Shard:
    """Clips [first, first + count) of a place, which is one of `vizdoom_worlds.MAPS` or `mujoco_rooms.PLACES`; for a
    fan, starts instead of clips, eight clips each."""

    place: str
    seed: int
    first: int
    count: int
    frames: int
    fan: bool = False

    @property
    def group(self) -> str:
        """What a store may hold in one division only."""
        return f"{self.place.replace('/', '-')}.{'fan' if self.fan else 'clips'}.{self.frames}f.seed{self.seed}."

    @property
    def name(self) -> str:
        return f"{self.group}{self.first:05}x{self.count}"

    @property
    def num_clips(self) -> int:
        return self.count * (8 if self.fan else 1)


def places(source: Source, split: str, maps: Sequence[str] = ()) -> list[str]:
    """Where clips of that source and split ("train", "test", "both") are made, or those of `maps` among them.

    ValueError for an unknown map, and when nothing is left.
    """
    if unknown := [name for name in maps if name not in vizdoom_worlds.MAPS]:
        raise ValueError(f"unknown map {unknown[0]!r}: maps are freedoom2/MAP01 to MAP32 and freedoom1/E1M1 to E4M9")
    doom = [name for name in maps or vizdoom_worlds.MAPS if split in ("both", vizdoom_worlds.split_of(name))]
    rooms = [name for name in mujoco_rooms.PLACES if split in ("both", mujoco_rooms.split_of(name))]
    found = doom * (source != "mujoco") + rooms * (source != "vizdoom")
    if not found:
        raise ValueError(f"none of the maps {', '.join(maps)} belongs to the {split} split")
    return found


def plan(found: Sequence[str], clips: int, frames: int, seed: int, fan: bool = False) -> list[Shard]:
    """`clips` clips spread evenly over places, in shards of alike size; of a fan, clips // 8 starts.

    ValueError for a number that is not positive, and for a fan of fewer than 8 clips.
    """
    units = clips // 8 if fan else clips
    if units < 1 or frames < 2:
        raise ValueError(f"{clips} clips of {frames} frames: ask for at least {8 if fan else 1} of at least 2")
    rooms = [place for place in found if place in mujoco_rooms.PLACES]
    doom = [place for place in found if place not in mujoco_rooms.PLACES]
    if not rooms or not doom:
        return _spread(found, units, frames, seed, fan)
    few = max(1, units // _ROOMS_SHARE)
    return _spread(doom, units - few, frames, seed, fan) + _spread(rooms, few, frames, seed, fan)


def render(shard: Shard, store: ClipStore) -> tuple[int, int]:
    """Render and store a shard, none where no clip found room: (clips stored, clips without room)."""
    failed = 0

    def clips() -> Iterator[Clip]:
        nonlocal failed
        world = mujoco_rooms.MujocoRooms if shard.place in mujoco_rooms.PLACES else vizdoom_worlds.VizdoomWorld
        with world(shard.place) as place:
            for index in range(shard.first, shard.first + shard.count):
                try:
                    made = (
                        place.fan(shard.seed, index, shard.frames)
                        if shard.fan
                        else [place.clip(shard.seed, index, shard.frames)]
                    )
                except NoStart:
                    failed += 1
                    continue
                yield from made
        if failed == shard.count:
            raise NoStart(shard.name)

    try:
        store.write_shard(shard.name, clips())
    except NoStart:
        return 0, shard.num_clips
    failed *= 8 if shard.fan else 1
    return shard.num_clips - failed, failed


def _spread(found: Sequence[str], units: int, frames: int, seed: int, fan: bool) -> list[Shard]:
    most = max(1, _SHARD_FRAMES // (frames * (8 if fan else 1)))
    shards = []
    for number, place in enumerate(found):
        share = (number + 1) * units // len(found) - number * units // len(found)
        for first in range(0, share, most):
            shards.append(Shard(place, seed, first, min(most, share - first), frames, fan))
    # Parts of one place are apart, so that the first minutes of a run show every place.
    return sorted(shards, key=lambda shard: shard.first)

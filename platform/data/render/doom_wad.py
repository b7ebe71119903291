"""A PWAD to load beside a Doom map: a script that puts the camera anywhere, and the map with everything at rest."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from longtake.platform.data.render.doom_map import LINE, SECTOR, THING

EYE = 4  # map units from the placed actor's feet to its eyes
# Columns, trees, stumps, lamps and candles of one picture; everything else moves, blinks or can be picked up.
STILL_THINGS = (1, 30, 31, 32, 33, 34, 35, 37, 43, 47, 48, 54, 2028)
_SCROLLING_LINES = (48, 85, *range(214, 219), *range(245, 256))
_NUM_LUMPS = 11  # a map's: its name, THINGS to BLOCKMAP


def scene_wad(iwad: Path, map_name: str) -> bytes:
    """The PWAD for one map of `iwad`. `puke 900 x y z angle` (map units, turns, 16.16 fixed point) places the feet."""
    lumps = [
        ("DECORATE", _ACTOR),
        ("KEYCONF", b"clearplayerclasses\naddplayerclass Viewpoint\n"),
        ("ANIMATED", b"\xff"),
        ("LOADACS", b"CAMACS\n"),
        ("A_START", b""),
        ("CAMACS", _camera_script()),
        ("A_END", b""),
        *_still_map(iwad.read_bytes(), map_name),
    ]
    body, directory = b"", b""
    for name, data in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return b"PWAD" + _words(len(lumps), 12 + len(body)) + body + directory


# A point that picks nothing up: the engine would lift a body of ordinary size onto every step that it touches.
_ACTOR = f"""
actor Viewpoint : DoomPlayer
{{
  Player.DisplayName "Viewpoint"
  Player.ViewHeight {EYE}
  Height {EYE}
  Radius 1
  Gravity 0
  -PICKUP
}}
""".encode()


def _camera_script() -> bytes:
    """A compiled library of ACS (format: ZDoom wiki, "ACS0 object") with one script of four arguments.

    The engine's own `warp` command takes whole units only, and SetActorPosition refuses places near a step; Warp does
    neither.
    """
    terminate, push, argument, drop, set_angle, call = 1, 3, 28, 54, 276, 351
    warp, absolute_angle, no_check, stop, absolute_position = 92, 0x2, 0x8, 0x80, 0x400
    flags = absolute_angle | no_check | stop | absolute_position
    position = [push, 0, argument, 0, argument, 1, argument, 2, push, 0, push, flags, call, 6, warp, drop]
    code = _words(*position, push, 0, argument, 3, set_angle, terminate)
    table = _words(1, 900, 8, 4, 0)  # scripts, number, offset, arguments; strings
    return b"ACS\0" + _words(8 + len(code)) + code + table


def _still_map(data: bytes, map_name: str) -> list[tuple[str, bytes]]:
    """The map's lumps without things that move, flickering lights and scrolling walls."""
    count, offset = struct.unpack_from("<ii", data, 4)
    entries = [struct.unpack_from("<ii8s", data, offset + 16 * index) for index in range(count)]
    names = [name.split(b"\0")[0].decode("ascii") for _, _, name in entries]
    at = names.index(map_name)
    lumps = {names[i]: data[entries[i][0] : sum(entries[i][:2])] for i in range(at, at + _NUM_LUMPS)}
    things, lines, sectors = (
        np.frombuffer(lumps[name], kind).copy()
        for name, kind in (("THINGS", THING), ("LINEDEFS", LINE), ("SECTORS", SECTOR))
    )
    lines["special"][np.isin(lines["special"], _SCROLLING_LINES)] = 0
    sectors["special"] = 0
    lumps["THINGS"] = things[np.isin(things["type"], STILL_THINGS)].tobytes()
    lumps["LINEDEFS"], lumps["SECTORS"] = lines.tobytes(), sectors.tobytes()
    return list(lumps.items())


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)

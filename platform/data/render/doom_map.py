"""Doom maps as plain geometry: where a camera may be, what it would see, what there is to say about it.

Read from the WAD rather than from the engine: it names textures, light and things as well, and costs nothing a frame.
Lengths are map units (32 to the metre) until the renderer turns poses into metres. Lump layouts: the Doom editors'
"Unofficial Doom Specs" 1.666, chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNITS_PER_METRE = 32.0
SKY = "F_SKY1"

THING = np.dtype([("x", "<i2"), ("y", "<i2"), ("angle", "<i2"), ("type", "<i2"), ("flags", "<i2")])
LINE = np.dtype(
    [("v1", "<u2"), ("v2", "<u2"), ("flags", "<u2"), ("special", "<u2"), ("tag", "<u2"), ("side", "<u2", 2)]
)
_SIDE = np.dtype([("x", "<i2"), ("y", "<i2"), ("upper", "S8"), ("lower", "S8"), ("middle", "S8"), ("sector", "<u2")])
_VERTEX = np.dtype([("x", "<i2"), ("y", "<i2")])
SECTOR = np.dtype(
    [
        ("floor", "<i2"),
        ("ceiling", "<i2"),
        ("floor_flat", "S8"),
        ("ceiling_flat", "S8"),
        ("light", "<i2"),
        ("special", "<i2"),
        ("tag", "<i2"),
    ]
)
_LUMPS = {
    "THINGS": (1, THING),
    "LINEDEFS": (2, LINE),
    "SIDEDEFS": (3, _SIDE),
    "VERTEXES": (4, _VERTEX),
    "SECTORS": (8, SECTOR),
}
_NO_SIDE = 0xFFFF
_IMPASSABLE = 1
_MEDIUM_SKILL, _MULTIPLAYER = 2, 16  # flags of a thing


@dataclass(frozen=True)
class DoomMap:
    """One map.

    Lines: `start`, `end` (L, 2) float; `front`, `back` (L,) sector numbers, back -1 for none; `solid` (L,) bool where
    nothing passes at any height (one-sided, impassable, or with a texture in the opening); `texture` (L,) the most
    visible wall texture. Sectors: `floor`, `ceiling` (S,) float, `floor_flat`, `ceiling_flat` (S,), `light` (S,) 0-255.
    Things of a single-player game: `thing_xy` (N, 2), `thing_type` (N,).
    """

    name: str
    start: np.ndarray
    end: np.ndarray
    front: np.ndarray
    back: np.ndarray
    solid: np.ndarray
    texture: np.ndarray
    floor: np.ndarray
    ceiling: np.ndarray
    floor_flat: np.ndarray
    ceiling_flat: np.ndarray
    light: np.ndarray
    thing_xy: np.ndarray
    thing_type: np.ndarray

    @property
    def opening(self) -> tuple[np.ndarray, np.ndarray]:
        """(bottom, top) of every line's opening; bottom > top where it has none."""
        back = np.maximum(self.back, 0)
        bottom = np.maximum(self.floor[self.front], self.floor[back])
        top = np.minimum(self.ceiling[self.front], self.ceiling[back])
        return np.where(self.solid, np.inf, bottom), np.where(self.solid, -np.inf, top)

    def sector_at(self, points: np.ndarray) -> np.ndarray:
        """Sector number of each of (N, 2) points, -1 in the void: the nearest line to the east tells."""
        out = np.full(len(points), -1, dtype=np.int64)
        # Off the integer grid that vertices lie on, so that no ray passes through one.
        points = points + np.array([0.0, 0.0137])
        (x1, y1), (x2, y2) = self.start.T, self.end.T
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (x2 - x1) / (y2 - y1)
        for first in range(0, len(points), 512):
            x, y = points[first : first + 512, :1], points[first : first + 512, 1:]
            crosses = (y1 <= y) != (y2 <= y)
            distance = np.where(crosses, x1 + (y - y1) * slope - x, np.inf)
            distance[distance <= 0] = np.inf
            nearest = distance.argmin(axis=1)
            found = np.isfinite(distance[np.arange(len(nearest)), nearest])
            # The front is on the right of start -> end; a line that runs north has its back to the west.
            sector = np.where(y2[nearest] > y1[nearest], self.back[nearest], self.front[nearest])
            out[first : first + 512] = np.where(found, sector, -1)
        return out

    def near(self, points: np.ndarray, margin: float) -> DoomMap:
        """The same map with only the lines within `margin` of the points' bounding box."""
        low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
        kept = ((np.maximum(self.start, self.end) >= low) & (np.minimum(self.start, self.end) <= high)).all(axis=1)
        return self._with_lines(kept)

    def _with_lines(self, kept: np.ndarray) -> DoomMap:
        lines = {name: getattr(self, name)[kept] for name in ("start", "end", "front", "back", "solid", "texture")}
        return DoomMap(**{**self.__dict__, **lines})

    def distances(self, points: np.ndarray) -> np.ndarray:
        """(N, L) distance of each point from each line segment."""
        along = self.end - self.start
        length2 = np.maximum((along**2).sum(axis=1), 1e-9)
        offset = points[:, None] - self.start
        t = np.clip((offset * along).sum(axis=2) / length2, 0, 1)
        return np.linalg.norm(offset - t[..., None] * along, axis=2)

    def views(self, points: np.ndarray, heights: np.ndarray, angles: np.ndarray) -> np.ndarray:
        """(N, A) horizontal distance that a level ray sees from each point at `heights` (N,) along `angles` (N, A)."""
        bottom, top = self.opening
        direction = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, :, None]
        along = self.end - self.start
        offset = self.start - points[:, None]
        cross = direction[..., 0] * along[:, 1] - direction[..., 1] * along[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((offset[..., 0] * along[:, 1] - offset[..., 1] * along[:, 0])[:, None]) / cross
            u = (offset[:, None, :, 0] * direction[..., 1] - offset[:, None, :, 1] * direction[..., 0]) / cross
        opaque = (heights[:, None] <= bottom) | (heights[:, None] >= top)
        hit = (t > 0) & (u >= 0) & (u <= 1) & opaque[:, None]
        return np.where(hit, t, np.inf).min(axis=2)

    def first_lines(self, point: np.ndarray, height: float, angles: np.ndarray) -> np.ndarray:
        """Number of the line that a level ray from `point` (2,) meets along each of `angles` (A,) rad, -1 for none."""
        bottom, top = self.opening
        wall = self._with_lines((height <= bottom) | (height >= top))
        numbers = np.flatnonzero((height <= bottom) | (height >= top))
        found = np.full(len(angles), -1)
        for index, angle in enumerate(angles):
            direction = np.array([np.cos(angle), np.sin(angle)])
            along, offset = wall.end - wall.start, wall.start - point
            cross = direction[0] * along[:, 1] - direction[1] * along[:, 0]
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (offset[:, 0] * along[:, 1] - offset[:, 1] * along[:, 0]) / cross
                u = (offset[:, 0] * direction[1] - offset[:, 1] * direction[0]) / cross
            t = np.where((t > 0) & (u >= 0) & (u <= 1), t, np.inf)
            if len(t) and np.isfinite(t.min()):
                found[index] = numbers[t.argmin()]
        return found


def read_maps(wad: Path) -> dict[str, DoomMap]:
    """All maps of a WAD in Doom's format, by name."""
    data = wad.read_bytes()
    count, offset = np.frombuffer(data, "<i4", 2, 4)
    directory = np.frombuffer(data, np.dtype([("at", "<i4"), ("size", "<i4"), ("name", "S8")]), count, offset)
    names = [name.decode("ascii") for name in directory["name"]]
    starts = [index - 1 for index, name in enumerate(names) if name == "THINGS"]

    def lump(index: int, dtype: np.dtype) -> np.ndarray:
        entry = directory[index]
        return np.frombuffer(data, dtype, entry["size"] // dtype.itemsize, entry["at"])

    found = {}
    for at in starts:
        assert all(names[at + place] == name for name, (place, _) in _LUMPS.items()), names[at]
        found[names[at]] = _build(names[at], {name: lump(at + place, kind) for name, (place, kind) in _LUMPS.items()})
    return found


def _build(name: str, lumps: dict[str, np.ndarray]) -> DoomMap:
    vertices = np.stack([lumps["VERTEXES"]["x"], lumps["VERTEXES"]["y"]], axis=1).astype(np.float64)
    lines, sides, sectors, things = (lumps[key] for key in ("LINEDEFS", "SIDEDEFS", "SECTORS", "THINGS"))
    front_side, back_side = lines["side"].T.astype(np.int64)
    has_back = back_side != _NO_SIDE
    back_side = np.where(has_back, back_side, 0)
    sector = sides["sector"].astype(np.int64)
    front, back = sector[front_side], np.where(has_back, sector[back_side], -1)
    middle, lower, upper = (_text(sides[key][front_side]) for key in ("middle", "lower", "upper"))
    texture = np.where(middle != "-", middle, np.where(lower != "-", lower, upper))
    solid = (
        ~has_back | (lines["flags"] & _IMPASSABLE != 0) | (middle != "-") | (_text(sides["middle"][back_side]) != "-")
    )
    present = (things["flags"] & _MEDIUM_SKILL != 0) & (things["flags"] & _MULTIPLAYER == 0)
    return DoomMap(
        name=name,
        start=vertices[lines["v1"]],
        end=vertices[lines["v2"]],
        front=front,
        back=back,
        solid=solid,
        texture=texture,
        floor=sectors["floor"].astype(np.float64),
        ceiling=sectors["ceiling"].astype(np.float64),
        floor_flat=_text(sectors["floor_flat"]),
        ceiling_flat=_text(sectors["ceiling_flat"]),
        light=sectors["light"].astype(np.int64),
        thing_xy=np.stack([things["x"], things["y"]], axis=1)[present].astype(np.float64),
        thing_type=things["type"][present].astype(np.int64),
    )


def _text(names: np.ndarray) -> np.ndarray:
    # What follows the first NUL of a name is rubbish that old editors left there.
    return np.array([name.split(b"\0")[0].decode("latin-1").upper() for name in names.tolist()])

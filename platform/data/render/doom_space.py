"""Where a camera may go in a Doom map, how high it is there, and what there is to say about the place."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np

from longtake.platform.data.render.doom_map import SKY, UNITS_PER_METRE, DoomMap
from longtake.platform.data.render.doom_wad import STILL_THINGS
from longtake.platform.data.render.paths import smooth

HEIGHT_SCALE = 1.2  # the engine draws a unit of height as long as 1.2 units of ground
_STEP, _OPENING, _THING_RADIUS = 24.0, 64.0, 12.0
_MAX_CELLS = 2500
_FAMILIES = {
    "brick walls": ("BRICK", "BRIK", "BIGBRIK"),
    "marble walls": ("MARB", "GSTGARG", "GSTLION", "GSTSATY", "GSTVINE", "GSTFONT"),
    "stone walls": ("STONE", "GSTONE", "BSTONE", "STON", "SLAD"),
    "rock walls": ("ROCK", "ASHWALL", "ZIMMER", "TANROCK", "ICKWALL", "BRONZE", "CEMENT"),
    "wooden walls": ("WOOD", "PANEL", "PANCASE", "PANBOOK", "PANBORD"),
    "metal walls": (
        "METAL",
        "SUPPORT",
        "SHAWN",
        "SILVER",
        "STEP",
        "PIPE",
        "DOOR",
        "BIGDOOR",
        "PLAT",
        "TEKLITE",
        "LITE",
    ),
    "panelled walls": ("STAR", "TEK", "SPACEW", "MOD", "SLADWALL"),
    "computer panels": ("COMP", "BFALL", "SPCDOOR"),
    "brown concrete walls": ("BROWN", "BRN", "BROVINE", "NUKE", "TAN"),
    "grey concrete walls": ("GRAY", "GRAY", "BLAKWAL", "CRACKLE"),
    "flesh walls": ("SKIN", "SK", "SP_"),
    "burning walls": ("FIRE",),
    "grassy floor": ("GRASS",),
    "water": ("FWATER", "WATER", "SWATER"),
    "green slime": ("NUKAGE", "SLIME0"),
    "lava": ("LAVA", "BLOOD"),
    "rocky floor": ("RROCK", "MFLR8", "ROCK", "SLIME", "RRR"),
    "wooden floor": ("FLAT5_1", "FLAT5_2", "WOOD", "CRATOP"),
    "metal floor": ("FLAT1", "FLAT23", "STEP", "SLIME14", "CONS", "GATE", "FLAT4", "FLAT2"),
    "marble floor": ("DEM1", "FLOOR7"),
    "tiled floor": ("FLOOR0", "FLOOR1", "FLOOR4", "FLOOR5", "FLOOR3", "FLAT14", "FLAT18", "FLAT19", "FLAT20", "FLAT3"),
    "concrete floor": ("FLAT", "FLOOR6", "CEIL"),
}
_WALLS, _FLOORS = list(_FAMILIES.items())[:12], list(_FAMILIES.items())[12:]


class Space:
    """The walkable part of a map, as a grid of the distance from walls, high steps, low openings and things.

    Points are (N, 2) metres on the plan. ValueError for a map where nobody can stand.
    """

    def __init__(self, doom_map: DoomMap) -> None:
        self.map = doom_map
        ends = np.concatenate([doom_map.start, doom_map.end])
        self._low = ends.min(axis=0) - 64
        extent = ends.max(axis=0) + 64 - self._low
        self._cell = max(4.0, float(extent.max()) / _MAX_CELLS)
        bottom, top = doom_map.opening
        back = np.maximum(doom_map.back, 0)
        step = np.abs(doom_map.floor[doom_map.front] - doom_map.floor[back])
        blocked = doom_map.solid | (step > _STEP) | (top - bottom < _OPENING)
        free = np.full(np.ceil(extent[::-1] / self._cell).astype(int) + 1, 255, dtype=np.uint8)
        for a, b in zip(self._pixels(doom_map.start[blocked]), self._pixels(doom_map.end[blocked]), strict=True):
            cv2.line(free, a.tolist(), b.tolist(), 0)
        for at in self._pixels(doom_map.thing_xy[np.isin(doom_map.thing_type, STILL_THINGS)]):
            cv2.circle(free, at.tolist(), round(_THING_RADIUS / self._cell), 0, -1)
        self._distance = cv2.distanceTransform(free, cv2.DIST_L2, 5) * (self._cell / UNITS_PER_METRE)

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """(N,) metres from the nearest obstacle."""
        column, row = self._pixels(points * UNITS_PER_METRE).T
        rows, columns = self._distance.shape
        inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
        return np.where(inside, self._distance[row.clip(0, rows - 1), column.clip(0, columns - 1)], -1.0)

    def starts(self, count: int, rng: np.random.Generator, min_light: int = 130) -> np.ndarray:
        """Up to `count` points (N, 2) with a metre of clearance, in lit sectors of some height, each area its share."""
        rows, columns = np.nonzero(self._distance >= 1.0)
        if not len(rows):
            raise ValueError(f"map {self.map.name} has no place to stand: leave it out of --maps")
        chosen = rng.integers(len(rows), size=4 * count)
        points = (np.stack([columns[chosen], rows[chosen]], axis=1) + rng.random((4 * count, 2)) - 0.5) * self._cell
        points += self._low
        sector = self.map.sector_at(points)
        good = (sector >= 0) & (self.map.light[sector] >= min_light)
        good &= self.map.ceiling[sector] - self.map.floor[sector] >= 72
        return points[good][:count] / UNITS_PER_METRE

    def eye_height(self, points: np.ndarray, eye: np.ndarray) -> np.ndarray | None:
        """(F,) metres of a camera that goes `eye` (F,) above the floor smoothly; None where it does not fit."""
        units = points * UNITS_PER_METRE
        sector = self.map.near(units, 2048).sector_at(units)
        if (sector < 0).any():
            return None
        scale = HEIGHT_SCALE / UNITS_PER_METRE
        floor, ceiling = self.map.floor[sector] * scale, self.map.ceiling[sector] * scale
        height = smooth(floor, 5.0) + eye
        fits = (height - floor > 0.9) & (height - floor < 2.2) & (ceiling - height > 0.35)
        return height if fits.all() else None

    def views(self, points: np.ndarray, height: np.ndarray, yaw: np.ndarray) -> np.ndarray:
        """(N, 5) metres that rays ahead and up to 35 degrees beside it see."""
        units = points * UNITS_PER_METRE
        angles = yaw[:, None] + np.radians([-35, -17, 0, 17, 35])
        seen = self.map.near(units, 1024).views(units, height * UNITS_PER_METRE / HEIGHT_SCALE, angles)
        return np.minimum(seen / UNITS_PER_METRE, 32.0)

    def describe(self, point: np.ndarray, height: float, yaw: float) -> str:
        """A caption of what stands around: no motion, under 90 characters."""
        unit = point * UNITS_PER_METRE
        sector = int(self.map.sector_at(unit[None])[0])
        angles = yaw + np.radians(np.arange(-60, 61, 10))
        level = height * UNITS_PER_METRE / HEIGHT_SCALE
        lines = self.map.first_lines(unit, level, angles)
        families = Counter(_family(str(self.map.texture[line]), _WALLS, "plain walls") for line in lines if line >= 0)
        walls = " and ".join(name for name, number in families.most_common(2) if number >= 4) or "varied walls"
        reach = float(np.median(self.views(point[None], np.array([height]), np.array([yaw]))))
        light = self.map.light[sector]
        brightness = "bright " if light >= 192 else "dim " if light < 144 else ""
        size = "narrow" if reach < 4 else "large" if reach > 10 else "spacious" if reach > 7 else "small"
        outdoors = self.map.ceiling_flat[sector] == SKY
        tall = (self.map.ceiling[sector] - self.map.floor[sector]) * HEIGHT_SCALE / UNITS_PER_METRE
        place = "courtyard under the sky" if outdoors else "hall, high ceiling" if tall > 6 else "room"
        floor = _family(str(self.map.floor_flat[sector]), _FLOORS, "plain floor")
        return _fit(f"a {size} {brightness}{place}", walls, floor)

    def _pixels(self, units: np.ndarray) -> np.ndarray:
        return np.floor((units - self._low) / self._cell + 0.5).astype(np.int64)


def _family(texture: str, families: list[tuple[str, tuple[str, ...]]], default: str) -> str:
    matches = [(len(prefix), name) for name, prefixes in families for prefix in prefixes if texture.startswith(prefix)]
    return max(matches)[1] if matches else default


def _fit(place: str, walls: str, floor: str) -> str:
    """Names of two walls are long: the second one goes first."""
    for text in (f"{place}, {walls}, {floor}", f"{place}, {walls.split(' and ')[0]}, {floor}"):
        if len(text) < 90:
            return text
    return place

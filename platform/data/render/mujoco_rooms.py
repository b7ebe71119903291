"""Clips of procedural rooms, drawn by MuJoCo: any camera pose, and depth in float metres.

The world is that of `paths`: +x east, +y down, +z north, floor at y = 0. MuJoCo's has z up, and its cameras look along
their -z.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Self

import cv2
import numpy as np

from longtake.platform.data.clip import Clip, Split
from longtake.platform.data.render.paths import FPS, NoStart, Path, Shot, drift, fan, random_path, wander
from longtake.platform.data.render.pixel_filter import pixels_of

IMAGE_SIZE = (192, 320)
LICENCE = "CC0-1.0"
PLACES = ("rooms/train", "rooms/test")
_SUPERSAMPLING, _TRIES, _LONG = 2, 400, 240
_TO_MUJOCO = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
_PATTERNS = ("brick", "tiled", "wooden", "plaster")


def split_of(place: str) -> Split:
    """Rooms are drawn from other random numbers for each split."""
    return "test" if place == PLACES[1] else "train"


@dataclass(frozen=True, eq=False)
class Room:
    """half (2,): half the floor's size. boxes (N, 6): centre x, y, z (z up) and half sizes. All in metres.

    patterns: of walls, floor and ceiling. textures: PNG files by name.
    """

    half: np.ndarray
    height: float
    boxes: np.ndarray
    patterns: tuple[str, ...]
    textures: dict[str, bytes]

    @classmethod
    def random(cls, rng: np.random.Generator) -> Room:
        half, height = rng.uniform(2.5, 6.0, 2), rng.uniform(2.6, 4.0)
        size = rng.uniform(0.15, 0.7, (rng.integers(4, 12), 3))
        centre = np.column_stack([rng.uniform(-half, half, (len(size), 2)), size[:, 2]])
        patterns = tuple(str(name) for name in rng.choice(_PATTERNS, 3))
        names = ("wall", "floor", "ceiling", "box0", "box1", "box2")
        kinds = (*patterns, *rng.choice(_PATTERNS, 3))
        textures = {f"{name}.png": _png(_texture(str(kind), rng)) for name, kind in zip(names, kinds, strict=True)}
        return cls(half, height, np.column_stack([centre, size]), patterns, textures)

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """(N,) metres of plan points (N, 2) from the walls and boxes."""
        walls = (self.half - np.abs(points)).min(axis=1)
        outside = np.abs(points[:, None] - self.boxes[:, :2]) - self.boxes[:, 3:5]
        return np.minimum(walls, np.linalg.norm(np.maximum(outside, 0), axis=2).min(axis=1))

    def caption(self) -> str:
        """What there is to see."""
        size = "small" if self.half.prod() < 12 else "large" if self.half.prod() > 22 else "medium"
        wall, floor, _ = self.patterns
        return f"a {size} bright room with {wall} walls, {floor} floor and {len(self.boxes)} boxes"

    def xml(self, image_size: tuple[int, int]) -> str:
        """The scene as MJCF, with one camera."""
        (x, y), h, t = self.half, self.height / 2, 0.1
        # MuJoCo smears a texture over the wide sides of a thin box, but for those that its z axis meets.
        slabs = [("wall", (side * (x + t), 0, h, y + t, h, t), ' xyaxes="0 1 0 0 0 1"') for side in (1, -1)]
        slabs += [("wall", (0, side * (y + t), h, x, h, t), ' xyaxes="1 0 0 0 0 1"') for side in (1, -1)]
        slabs += [("floor", (0, 0, -t, x, y, t), ""), ("ceiling", (0, 0, self.height + t, x, y, t), "")]
        slabs += [(f"box{number % 3}", box, "") for number, box in enumerate(self.boxes)]
        names = [name.removesuffix(".png") for name in self.textures]
        assets = "".join(
            f'<texture name="{name}" type="2d" file="{name}.png"/>'
            f'<material name="{name}" texture="{name}" texuniform="true" texrepeat=".7 .7" specular="0"/>'
            for name in names
        )
        geoms = "".join(
            '<geom type="box" material="{}" pos="{} {} {}" size="{} {} {}"{}/>'.format(name, *box, turned)
            for name, box, turned in slabs
        )
        return (
            f'<mujoco><visual><global offwidth="{image_size[1]}" offheight="{image_size[0]}"/><map znear="0.002"/>'
            '<headlight ambient=".55 .55 .55" diffuse=".35 .35 .35" specular="0 0 0"/></visual>'
            f"<asset>{assets}</asset><worldbody>{geoms}"
            f'<light pos="{x / 3} {y / 4} {self.height - 0.3}" dir="0 0 -1" diffuse=".35 .35 .3" castshadow="false"/>'
            '<camera name="camera"/></worldbody></mujoco>'
        )


class MujocoRooms:
    """Rooms of one of PLACES, each clip in its own; a context manager.

    ValueError for an unknown place, and when MuJoCo or EGL, through which it draws without a display, is missing.
    """

    def __init__(self, place: str = PLACES[0], image_size: tuple[int, int] = IMAGE_SIZE) -> None:
        if place not in PLACES:
            raise ValueError(f"unknown place {place!r}: choose one of {', '.join(PLACES)}")
        self.place, self.image_size = place, image_size
        self._mujoco = _mujoco()
        self._renderer: Any = None
        cv2.setNumThreads(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def render(self, room: Room, c2w: np.ndarray, focal: float, depth: bool = False) -> Shot:
        """The views of c2w (F, 4, 4) in a room, with float depth (F, H, W) in metres when asked for."""
        height, width = self.image_size
        fine = (height * _SUPERSAMPLING, width * _SUPERSAMPLING)
        model = self._mujoco.MjModel.from_xml_string(room.xml(fine), assets=room.textures)
        data = self._mujoco.MjData(model)
        model.cam_fovy[0] = math.degrees(2 * math.atan(height / 2 / focal))
        self.close()
        self._renderer = self._mujoco.Renderer(model, *fine)
        frames = []
        for pose in c2w:
            self._aim(model, data, pose)
            frames.append(pixels_of(self._renderer.render(), self.image_size))
        depths = self._depths(model, data, c2w) if depth else None
        return Shot(np.stack(frames), c2w, depths)

    def _depths(self, model: Any, data: Any, c2w: np.ndarray) -> np.ndarray:
        """Depth at the pixels' centres: the mean of the four fine pixels around it."""
        self._renderer.enable_depth_rendering()
        depths = []
        for pose in c2w:
            self._aim(model, data, pose)
            depths.append(cv2.resize(self._renderer.render(), self.image_size[::-1], interpolation=cv2.INTER_AREA))
        self._renderer.disable_depth_rendering()
        return np.stack(depths)

    def _aim(self, model: Any, data: Any, pose: np.ndarray) -> None:
        rotation = _TO_MUJOCO @ pose[:3, :3] @ np.diag([1.0, -1, -1])
        model.cam_pos[0] = _TO_MUJOCO @ pose[:3, 3]
        self._mujoco.mju_mat2Quat(model.cam_quat[0], rotation.ravel())
        self._mujoco.mj_forward(model, data)
        self._renderer.update_scene(data, camera="camera")

    def clip(self, seed: int, index: int, frames: int = 81) -> Clip:
        """Clip `index`: the same for the same place, seed, index and length. NoStart for a room too crowded to walk."""
        room, rng, focal = self._room(seed, index, frames)
        kind = None if frames <= _LONG else "wander"
        for _ in range(_TRIES):
            start, yaw = rng.uniform(-room.half, room.half), rng.uniform(0, 2 * math.pi)
            if room.clearance(start[None])[0] < 0.6:
                continue
            if kind == "wander":
                path = wander(frames, rng, room.clearance, start)
            else:
                path = random_path(frames, rng).placed(start, yaw)
            if room.clearance(path.position).min() > 0.4:
                return self._clip(
                    f"{self._name()}-{seed}-{index:05}-{frames}", room, _freed(path, rng), focal, seed, index
                )
        raise NoStart(f"{self.place}: room {index} of seed {seed} has no space for {frames} frames: give a new --seed")

    def fan(self, seed: int, index: int, frames: int = 81) -> list[Clip]:
        """Eight clips from one start, keys START/0 to START/7 in the order of `paths.FAN`."""
        room, rng, focal = self._room(seed, index, frames)
        name = f"{self._name()}-{seed}-{index:05}"
        for _ in range(_TRIES):
            start, yaw = rng.uniform(-room.half, room.half), rng.uniform(0, 2 * math.pi)
            paths = [path.placed(start, yaw) for path in fan(frames)]
            if min(room.clearance(path.position).min() for path in paths) > 0.4:
                return [self._clip(f"{name}/{n}", room, path, focal, seed, index) for n, path in enumerate(paths)]
        raise NoStart(f"{self.place}: room {index} of seed {seed} is too small for a fan of {frames} frames")

    def _name(self) -> str:
        return self.place.replace("/", "-")

    def _room(self, seed: int, index: int, frames: int) -> tuple[Room, np.random.Generator, float]:
        rng = np.random.default_rng([1000 + PLACES.index(self.place), seed, index, frames])
        return Room.random(rng), rng, self.image_size[1] / 2 / math.tan(math.radians(rng.uniform(70, 85)) / 2)

    def _clip(self, key: str, room: Room, path: Path, focal: float, seed: int, index: int) -> Clip:
        shot = self.render(room, path.c2w(path.eye), focal)
        height, width = self.image_size
        return Clip(
            key=key,
            frames=shot.frames,
            c2w=shot.c2w,
            intrinsics=np.tile(np.array([focal, focal, width / 2, height / 2], np.float32), (len(path), 1)),
            fps=FPS,
            caption=room.caption(),
            metric_scale=1.0,
            licence=LICENCE,
            provenance={"engine": "mujoco", "place": self.place, "kind": path.kind, "seed": seed, "index": index},
            split=split_of(self.place),
            actions=path.actions,
        )


def _freed(path: Path, rng: np.random.Generator) -> Path:
    """The path with a hand's freedom of pitch, roll and height, unless it must stay as its kind says."""
    if path.kind in ("still", "actions", "return", "wander return"):
        return path
    sway = [drift(len(path), rng, 1.2 * FPS) for _ in range(3)]
    pitch, roll, eye = path.pitch + 0.15 * sway[0], path.roll + 0.08 * sway[1], path.eye + 0.12 * sway[2]
    return replace(path, pitch=pitch, roll=roll, eye=np.clip(eye, 0.9, 2.2))


def _texture(kind: str, rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """(size, size, 3) uint8: a pattern over noise of all scales, so that every patch can be told from the others."""
    base = rng.uniform(70, 210, 3)
    noise = sum(
        cv2.resize(rng.normal(size=(n, n, 3)), (size, size), interpolation=cv2.INTER_CUBIC) * 60 / (2 + k)
        for k, n in enumerate((3, 8, 24, 64))
    )
    image = base + noise * 0.7
    row, column = np.mgrid[:size, :size]
    cells = {"brick": (32, 64), "tiled": (64, 64), "wooden": (32, 512), "plaster": (512, 512)}[kind]
    shifted = column + (row // cells[0] % 2) * (cells[1] // 2 if kind == "brick" else 0)
    shade = rng.normal(size=(64, 64)) * 14
    image += shade[row // cells[0] % 64, shifted // cells[1] % 64][..., None]
    seam = ((row % cells[0] < 3) | (shifted % cells[1] < 3)) & (kind != "plaster")
    image[seam] -= 45
    return np.clip(image, 20, 245).astype(np.uint8)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def _mujoco() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        mujoco.GLContext(8, 8).free()
    except ModuleNotFoundError as error:
        raise ValueError("rendering rooms needs MuJoCo: pip install 'longtake[render]'") from error
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError("rendering rooms needs EGL: apt install libegl1 libgl1-mesa-dri") from error
    return mujoco

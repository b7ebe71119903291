"""Clips of the Freedoom maps, drawn by ViZDoom.

The engine's software renderer turns only about the vertical: what it calls pitch is a shear. It therefore draws a wider
level view, which a homography turns into a pinhole camera with pitch and roll. Its camera is a pinhole with square
pixels once a unit of height counts 1.2 units of ground; 32 units of ground are a metre.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, Self

import cv2
import numpy as np

from longtake.platform.data.clip import Clip, Split
from longtake.platform.data.render.doom_map import UNITS_PER_METRE, DoomMap, read_maps
from longtake.platform.data.render.doom_space import HEIGHT_SCALE, Space
from longtake.platform.data.render.doom_wad import EYE, scene_wad
from longtake.platform.data.render.paths import ACTION_SPEEDS, FPS, KINDS, NoStart, Path, Shot, fan, random_path, wander
from longtake.platform.data.render.pixel_filter import pixels_of

IMAGE_SIZE = (192, 320)
LICENCE = "BSD-3-Clause"
MAPS = tuple(f"freedoom2/MAP{i:02}" for i in range(1, 33)) + tuple(
    f"freedoom1/E{e}M{m}" for e in range(1, 5) for m in range(1, 10)
)
TEST_MAPS = tuple(f"freedoom2/MAP{i:02}" for i in (4, 10, 16, 22, 28)) + tuple(
    f"freedoom1/{m}" for m in ("E1M5", "E2M3", "E3M6")
)
_ENGINE_SIZE, _ENGINE_FOV = (480, 640), 92.0  # holds an 80 degree view at 8 degrees of pitch and 3 of roll
_SUPERSAMPLING = 2
_MARGIN, _LONG = 0.5, 240  # metres from obstacles; paths of more frames than this steer by themselves
_MIN_LUMA, _TRIES = 60.0, 400
_BRIGHTEN = (255 * (np.arange(256) / 255) ** (1 / 1.5)).round().astype(np.uint8)  # the maps are dark
_DEPTH_UNITS = 7.3  # map units a level of the depth buffer


def split_of(map_name: str) -> Split:
    """Maps are the unit of the split, so that no place is in both."""
    return "test" if map_name in TEST_MAPS else "train"


class VizdoomWorld:
    """One map in one engine process; a context manager. Nothing in it moves.

    map_name: one of MAPS. image_size: (height, width) of the clips. depth: also keep the engine's 8-bit depth buffer,
    which is good to about 0.2 m. ValueError for an unknown map, and when ViZDoom is missing.
    """

    def __init__(self, map_name: str, image_size: tuple[int, int] = IMAGE_SIZE, depth: bool = False) -> None:
        self.map_name, self.image_size, self._depth = map_name, image_size, depth
        self.space = Space(load_map(map_name))
        self._folder = tempfile.TemporaryDirectory(prefix="vizdoom-")
        self._game = self._start()
        cv2.setNumThreads(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._game.close()
        self._folder.cleanup()

    def _start(self) -> Any:
        vzd = _vizdoom()
        wad, _, map_name = self.map_name.partition("/")
        iwad, scene = _wads() / f"{wad}.wad", File(self._folder.name, "scene.wad")
        scene.write_bytes(scene_wad(iwad, map_name))
        game = vzd.DoomGame()
        game.set_doom_game_path(str(iwad))
        game.set_doom_map(map_name)
        game.set_doom_config_path(str(scene.with_name("engine.ini")))
        game.set_window_visible(False)
        game.set_screen_resolution(getattr(vzd.ScreenResolution, f"RES_{_ENGINE_SIZE[1]}X{_ENGINE_SIZE[0]}"))
        game.set_screen_format(vzd.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(self._depth)
        for part in ("hud", "weapon", "crosshair", "messages", "decals", "particles", "screen_flashes"):
            getattr(game, f"set_render_{part}")(False)
        names = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE")
        game.set_available_game_variables([getattr(vzd.GameVariable, f"CAMERA_{name}") for name in names])
        game.set_episode_timeout(0)
        game.add_game_args(f"-file {scene} +sv_cheats 1")
        before = os.getcwd()
        os.chdir(self._folder.name)  # the engine writes into the working directory
        try:
            game.init()
        finally:
            os.chdir(before)
        for command in ("god", "noclip", "notarget", "movebob 0", f"fov {_ENGINE_FOV}"):
            game.send_game_command(command)
        game.advance_action(4)
        return game

    def render(self, c2w: np.ndarray, focal: float) -> Shot:
        """The view of c2w (F, 4, 4) with focal length in pixels; the pose that was drawn may differ by a millimetre.

        ValueError when the engine put the camera elsewhere, or the wide view does not hold the picture.
        """
        rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
        yaw = np.arctan2(rotation[:, 2, 2], rotation[:, 0, 2])
        east, north = position[:, 0] * UNITS_PER_METRE, position[:, 2] * UNITS_PER_METRE
        feet = -position[:, 1] * UNITS_PER_METRE / HEIGHT_SCALE - EYE
        following = np.append(feet[1:], feet[-1])
        drawn, frames, depths = c2w.copy(), [], []
        self._move(east[0], north[0], feet[0], yaw[0], tics=4)
        for at in range(len(c2w)):
            # Height takes effect one tic after everything else.
            self._move(east[at], north[at], following[at], yaw[at])
            state = self._game.get_state()
            x, y, z, angle = state.game_variables
            drawn[at, :3, 3] = x / UNITS_PER_METRE, -z * HEIGHT_SCALE / UNITS_PER_METRE, y / UNITS_PER_METRE
            if np.abs(drawn[at, :3, 3] - position[at]).max() > 0.25:
                raise ValueError(
                    f"{self.map_name}: the engine moved the camera from {position[at]} to {drawn[at, :3, 3]}"
                )
            warp = self._warp(math.radians(angle), rotation[at], focal)
            frames.append(self._project(state.screen_buffer, *warp))
            if self._depth:
                depths.append(self._project_depth(state.depth_buffer, *warp))
        return Shot(np.stack(frames), drawn, np.stack(depths) if depths else None)

    def _move(self, x: float, y: float, z: float, yaw: float, tics: int = 1) -> None:
        fixed = [round(value * 65536) for value in (x, y, z, yaw / (2 * math.pi) % 1)]
        self._game.send_game_command("puke 900 {} {} {} {}".format(*fixed))
        self._game.advance_action(tics)

    def _warp(self, yaw: float, rotation: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray]:
        """Rays of the picture in the engine's level camera, as matrices: from pixels to rays, and on to its pixels."""
        height, width = self.image_size
        level = np.array([[math.sin(yaw), 0, math.cos(yaw)], [0, 1, 0], [-math.cos(yaw), 0, math.sin(yaw)]])
        pixels_to_rays = np.array([[1 / focal, 0, -width / 2 / focal], [0, 1 / focal, -height / 2 / focal], [0, 0, 1]])
        rays = level.T @ rotation @ pixels_to_rays
        wide = _ENGINE_SIZE[1] / 2 / math.tan(math.radians(_ENGINE_FOV) / 2)
        engine = np.array([[wide, 0, _ENGINE_SIZE[1] / 2], [0, wide, _ENGINE_SIZE[0] / 2], [0, 0, 1]])
        corners = engine @ rays @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])
        inside = corners[:2] / corners[2]
        if (corners[2] <= 0).any() or (inside < 0).any() or (inside.max(axis=1) > _ENGINE_SIZE[::-1]).any():
            raise ValueError("the camera looks past the engine's view: less pitch and roll, or a longer focal length")
        return rays, engine @ rays

    def _project(self, image: np.ndarray, _: np.ndarray, homography: np.ndarray) -> np.ndarray:
        height, width = self.image_size
        s = _SUPERSAMPLING
        # cv2 counts from the first pixel's centre, cameras from its edge.
        finer = np.array([[1 / s, 0, 0.5 / s], [0, 1 / s, 0.5 / s], [0, 0, 1]])
        centred = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        fine = cv2.warpPerspective(image, centred @ homography @ finer, (width * s, height * s), flags=flags)
        return cv2.LUT(pixels_of(fine, self.image_size), _BRIGHTEN)

    def _project_depth(self, depth: np.ndarray, rays: np.ndarray, homography: np.ndarray) -> np.ndarray:
        height, width = self.image_size
        v, u = np.mgrid[:height, :width] + 0.5
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
        at = pixels @ homography.T
        nearest = (at[..., :2] / at[..., 2:]).astype(int)
        level = depth[nearest[..., 1], nearest[..., 0]] * (_DEPTH_UNITS / UNITS_PER_METRE)
        return (level / (pixels @ rays.T)[..., 2]).astype(np.float32)

    def clip(self, seed: int, index: int, frames: int = 81) -> Clip:
        """Clip `index` of this map: the same for the same map, seed, index and length.

        ValueError when no bright, roomy start was found.
        """
        rng = self._rng(seed, index, frames)
        focal = self._focal(rng)
        for path in self._paths(rng, frames):
            if (c2w := self._accepted(path)) is not None and self._bright(c2w, focal):
                return self._clip(
                    f"{self._name()}-{seed}-{index:05}-{frames}", path, c2w, focal, {"seed": seed, "index": index}
                )
        raise NoStart(
            f"map {self.map_name}: no start for clip {index} of seed {seed} in {_TRIES} tries; leave the map out"
        )

    def fan(self, seed: int, index: int, frames: int = 81) -> list[Clip]:
        """Eight clips from one start, keys START/0 to START/7 in the order of `paths.FAN`; ValueError as for `clip`."""
        rng = self._rng(seed, index, frames, 8)
        focal, name = self._focal(rng), f"{self._name()}-{seed}-{index:05}"
        paths = fan(frames, FPS)
        for start, yaw in self._starts(rng):
            placed = [path.placed(start, yaw) for path in paths]
            poses = []
            for path in placed:
                if (c2w := self._accepted(path, 0.9)) is None:
                    break
                poses.append(c2w)
            if len(poses) == len(paths) and all(self._bright(c2w, focal) for c2w in poses):
                about = {"seed": seed, "index": index, "start": name}
                both = enumerate(zip(placed, poses, strict=True))
                return [self._clip(f"{name}/{number}", path, c2w, focal, about) for number, (path, c2w) in both]
        raise NoStart(
            f"map {self.map_name}: no start for fan {index} of seed {seed} in {_TRIES} tries; leave the map out"
        )

    def _name(self) -> str:
        return self.map_name.replace("/", "-")

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([MAPS.index(self.map_name), *numbers])

    def _focal(self, rng: np.random.Generator) -> float:
        return self.image_size[1] / 2 / math.tan(math.radians(rng.uniform(75, 80)) / 2)

    def _starts(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, float]]:
        for _ in range(_TRIES // 20):
            for point in self.space.starts(20, rng):
                yield point, rng.uniform(0, 2 * math.pi)

    def _paths(self, rng: np.random.Generator, frames: int) -> Iterator[Path]:
        # Drawn once: easier kinds would fill the corpus if each try drew again.
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        for start, yaw in self._starts(rng):
            if frames > _LONG:
                yield wander(frames, rng, self.space.clearance, start, FPS, _MARGIN + 0.05)
                continue
            for _ in range(4):
                yield random_path(frames, rng, FPS, kind).placed(start, yaw)

    def _accepted(self, path: Path, min_view: float = 1.6) -> np.ndarray | None:
        """Poses of a path that keeps clear of walls, fits under ceilings and has something to see."""
        if self.space.clearance(path.position).min() < _MARGIN:
            return None
        if len(path) > _LONG and np.ptp(path.position, axis=0).max() < 4:
            return None  # a walk that stayed in a nook
        if (height := self.space.eye_height(path.position, path.eye)) is None:
            return None
        some = np.linspace(0, len(path) - 1, 7).round().astype(int)
        views = self.space.views(path.position[some], height[some], path.yaw[some])
        if np.median(views) < 3.5 or np.median(views, axis=1).min() < min_view:
            return None
        return path.c2w(height)

    def _bright(self, c2w: np.ndarray, focal: float) -> bool:
        for at in np.linspace(0, len(c2w) - 1, 3).round().astype(int):
            shot = self.render(c2w[at : at + 1], focal).frames[0]
            if cv2.cvtColor(shot, cv2.COLOR_RGB2GRAY).mean() < _MIN_LUMA:
                return False
        return True

    def _clip(self, key: str, path: Path, c2w: np.ndarray, focal: float, about: dict[str, Any]) -> Clip:
        shot = self.render(c2w, focal)
        height, width = self.image_size
        wad, _, name = self.map_name.partition("/")
        extra: dict[str, Any] = {"key_map": "official", **ACTION_SPEEDS} if path.actions else {}
        return Clip(
            key=key,
            frames=shot.frames,
            c2w=shot.c2w,
            intrinsics=np.tile(np.array([focal, focal, width / 2, height / 2], np.float32), (len(c2w), 1)),
            fps=FPS,
            caption=self.space.describe(path.position[0], -c2w[0, 1, 3], path.yaw[0]),
            metric_scale=1.0,
            licence=LICENCE,
            provenance={"engine": "vizdoom", "wad": f"{wad}.wad", "map": name, "kind": path.kind, **about, **extra},
            split=split_of(self.map_name),
            actions=path.actions,
        )


def load_map(map_name: str) -> DoomMap:
    """The geometry of one of MAPS."""
    if map_name not in MAPS:
        raise ValueError(f"unknown map {map_name!r}: maps are freedoom2/MAP01 to MAP32 and freedoom1/E1M1 to E4M9")
    wad, _, name = map_name.partition("/")
    return read_maps(_wads() / f"{wad}.wad")[name]


def _vizdoom() -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise ValueError("rendering Doom maps needs ViZDoom: pip install 'longtake[render]'") from error
    return vizdoom


def _wads() -> File:
    return File(_vizdoom().__file__).parent

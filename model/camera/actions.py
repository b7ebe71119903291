"""The action language: keys held for frames, such as "w-80" or "dw-40,none-8", turned into a trajectory.

Both releases of SANA-WM read the same letters differently, hence the named key maps. Speeds are in metres and degrees a
second; the published values a frame at 16 frames a second are given beside them.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.model.camera.pose import intrinsics_from_fov
from longtake.model.camera.trajectory import Trajectory


@dataclass(frozen=True)
class KeyMap:
    """What keys do, and how fast.

    keys: letter to (forward, right, yaw to the right, pitch up) in -1, 0, 1. translation_speed m/s, rotation_speed and
    pitch_limit degrees (a second). press, coast: seconds in which a velocity closes most of its distance to the target
    while a key is held, and after it was let go; 0 moves at once.
    """

    keys: dict[str, tuple[int, int, int, int]]
    translation_speed: float
    rotation_speed: float
    pitch_limit: float
    press: float = 0.0
    coast: float = 0.0


_FORWARD = {"w": (1, 0, 0, 0), "s": (-1, 0, 0, 0), "i": (0, 0, 0, 1), "k": (0, 0, 0, -1)}
_YAW, _STRAFE = ((0, 0, -1, 0), (0, 0, 1, 0)), ((0, -1, 0, 0), (0, 1, 0, 0))

KEY_MAPS = {
    # Today's: a/d turn, j/l strafe, smoothed; 0.025 m and 0.6 degrees a frame.
    "official": KeyMap(
        {**_FORWARD, **dict(zip("ad", _YAW, strict=True)), **dict(zip("jl", _STRAFE, strict=True))},
        0.4,
        9.6,
        60,
        0.45,
        1.0,
    ),
    # The first release's, which diffusers keeps: a/d strafe, j/l turn, at once; 0.05 m and 1.2 degrees a frame.
    "diffusers": KeyMap(
        {**_FORWARD, **dict(zip("ad", _STRAFE, strict=True)), **dict(zip("jl", _YAW, strict=True))}, 0.8, 19.2, 85
    ),
}


def parse_actions(
    text: str,
    key_map: str = "official",
    fps: float = 16.0,
    *,
    translation_speed: float | None = None,
    rotation_speed: float | None = None,
    fov_deg: float = 75.0,
    image_size: tuple[int, int] = (704, 1280),
) -> Trajectory:
    """The trajectory of "keys-frames" segments joined by commas; N frames of actions give N + 1 poses, the first the
    identity.

    Speeds in m/s and degrees a second (default: the key map's). Movement stays in the horizontal plane, whatever the
    pitch. ValueError for an unknown key map, unknown keys, and durations that are not positive whole numbers.
    """
    steering = Steering(key_map, fps, translation_speed, rotation_speed)
    poses, _ = steering.move(text)
    c2w = torch.cat([torch.eye(4)[None], poses])
    return Trajectory(c2w, intrinsics_from_fov(fov_deg, image_size), image_size, fps, actions=text)


@dataclass(frozen=True)
class Motion:
    """Where a steered camera is and how it moves: position (x, z) in metres, yaw to the right and pitch up in radians,
    velocity as shares of full speed (forward, right, yaw, pitch)."""

    position: tuple[float, float] = (0.0, 0.0)
    yaw: float = 0.0
    pitch: float = 0.0
    velocity: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Steering:
    """What keys do at `fps` frames a second; speeds in m/s and degrees a second, by default the key map's."""

    key_map: str = "official"
    fps: float = 16.0
    translation_speed: float | None = None
    rotation_speed: float | None = None

    def __post_init__(self) -> None:
        if self.key_map not in KEY_MAPS:
            near = difflib.get_close_matches(self.key_map, KEY_MAPS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key map {self.key_map!r}: choose one of {', '.join(KEY_MAPS)}{hint}")

    def move(self, text: str, motion: Motion = Motion()) -> tuple[Tensor, Motion]:  # noqa: B008  # it is frozen
        """N frames of actions from `motion` on: c2w (N, 4, 4), and the motion after them. ValueError as in
        `parse_actions`.
        """
        keys = KEY_MAPS[self.key_map]
        speed = keys.translation_speed if self.translation_speed is None else self.translation_speed
        turn_speed = keys.rotation_speed if self.rotation_speed is None else self.rotation_speed
        return _roll_out(_held_keys(text, keys), keys, 1 / self.fps, speed, turn_speed, motion)


def random_actions(frames: int, seed: int, key_map: str = "official") -> str:
    """A varied key sequence of exactly `frames` frames: walking and turning in pieces of one to four seconds."""
    generator = random.Random(seed)
    turns = ("a", "d") if key_map == "official" else ("j", "l")
    strafes = ("j", "l") if key_map == "official" else ("a", "d")
    choices = ["w", "w", "s", *(turn + "w" for turn in turns * 2), *turns, *strafes]
    pieces, left = [], frames
    while left:
        length = min(left, generator.randint(16, 64))
        length = left if left - length < 8 else length
        pieces.append(f"{''.join(sorted(generator.choice(choices)))}-{length}")
        left -= length
    return ",".join(pieces)


def repeated_actions(text: str, frames: int) -> str:
    """The key sequence, again from its beginning where it ends, of exactly `frames` frames. ValueError for durations as
    in `parse_actions`.
    """
    pieces, left = [], frames
    for letters, duration in itertools.cycle(_segments(text)):
        if left <= 0:
            break
        pieces.append(f"{letters}-{min(left, duration)}")
        left -= duration
    return ",".join(pieces)


def actions_length(text: str) -> int:
    """Frames that a key sequence lasts. ValueError for durations as in `parse_actions`."""
    return sum(duration for _, duration in _segments(text))


def split_actions(text: str, frames: int) -> list[str]:
    """Actions in pieces of `frames` frames: one after another they hold the same keys. ValueError when their length is
    not a multiple of it, and for durations as in `parse_actions`.
    """
    pieces: list[str] = []
    piece, room, total = [], frames, 0
    for letters, left in _segments(text):
        total += left
        while left:
            taken = min(left, room)
            piece.append(f"{letters}-{taken}")
            left, room = left - taken, room - taken
            if not room:
                pieces.append(",".join(piece))
                piece, room = [], frames
    if piece:
        near = max(1, round(total / frames)) * frames
        raise ValueError(f"actions {text} last {total} frames: give a multiple of {frames}, such as {near}")
    return pieces


def _segments(text: str) -> list[tuple[str, int]]:
    """Keys, and how many frames they are held, one after another."""
    found = []
    for segment in "".join(text.split()).split(","):
        letters, dash, duration = segment.rpartition("-")
        if not dash or not letters or not duration.isascii() or not duration.isdigit() or int(duration) < 1:
            raise ValueError(f"action {segment!r} must be KEYS-FRAMES with at least 1 frame, such as w-40 or none-8")
        found.append((letters, int(duration)))
    return found


def _held_keys(text: str, key_map: KeyMap) -> list[tuple[int, int, int, int]]:
    """For each frame, the sum of the held keys' directions."""
    held = []
    for letters, duration in _segments(text):
        keys = "" if letters.lower() == "none" else letters.lower()
        if unknown := sorted(set(keys) - set(key_map.keys)):
            raise ValueError(
                f"action {letters}-{duration} has unknown keys {''.join(unknown)}: use {''.join(sorted(key_map.keys))} "
                "or none"
            )
        directions = [key_map.keys[letter] for letter in set(keys)]
        total = tuple(sum(axis) for axis in zip(*directions, strict=True)) if directions else (0, 0, 0, 0)
        held += [total] * duration
    return held


def _roll_out(
    held: list[tuple[int, int, int, int]],
    key_map: KeyMap,
    seconds: float,
    speed: float,
    turn_speed: float,
    motion: Motion,
) -> tuple[Tensor, Motion]:
    """Integrate velocities in double precision: c2w (N, 4, 4)."""
    velocity, yaw, pitch, position = [*motion.velocity], motion.yaw, motion.pitch, [*motion.position]
    poses = []
    for target in held:
        for axis in range(4):
            tau = key_map.press if target[axis] else key_map.coast
            share = 1 - math.exp(-seconds / tau) if tau else 1.0
            velocity[axis] += share * (target[axis] - velocity[axis])
        forward, right, turn, lift = (value * seconds for value in velocity)
        yaw += math.radians(turn * turn_speed)
        raised = pitch + math.radians(lift * turn_speed)
        pitch = raised if abs(raised) <= math.radians(key_map.pitch_limit) else pitch
        position[0] += speed * (forward * math.sin(yaw) + right * math.cos(yaw))
        position[1] += speed * (forward * math.cos(yaw) - right * math.sin(yaw))
        poses.append(_pose(yaw, pitch, position))
    return torch.stack(poses), Motion(tuple(position), yaw, pitch, tuple(velocity))  # type: ignore[arg-type]


def _pose(yaw: float, pitch: float, position: list[float]) -> Tensor:
    """c2w of a camera at (x, z) that turned right by `yaw` and looks up by `pitch`, radians."""
    (cy, sy), (cp, sp) = (math.cos(yaw), math.sin(yaw)), (math.cos(pitch), math.sin(pitch))
    return torch.tensor(
        [
            [cy, sy * sp, sy * cp, position[0]],
            [0, cp, -sp, 0],
            [-sy, cy * sp, cy * cp, position[1]],
            [0, 0, 0, 1],
        ],
        dtype=torch.float32,
    )

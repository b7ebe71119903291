"""Camera paths over a floor: random walks of several kinds, reactive long walks, and fans from one start.

A path lives in a plan, metres with +x east and +y north; yaw is counter-clockwise from east. `Path.c2w` turns it into
poses of a world with +x east, +y down, +z north, so that an upright camera has OpenCV's axes at yaw 90 degrees.
Typical speeds are those of the action language's faster key map: 0.8 m/s and 18 degrees a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from longtake.model.camera import parse_actions, random_actions

FPS = 16.0
SPEED, TURN = 0.8, math.radians(18)
ACTION_SPEEDS = {"translation_speed": 0.8, "rotation_speed": 18.0}  # m/s and degrees a second of `actions`
MAX_SPEED, MAX_TURN = 1.5, math.radians(45)
MAX_PITCH, MAX_ROLL = math.radians(8), math.radians(3)
KINDS = {
    "walk": 0.32,
    "strafe": 0.1,
    "turn": 0.1,
    "back": 0.08,
    "orbit": 0.1,
    "return": 0.12,
    "still": 0.05,
    "actions": 0.13,
}
FAN = ("forward", "backward", "left", "right", "yaw left", "yaw right", "forward yaw left", "forward yaw right")
Clearance = Callable[[np.ndarray], np.ndarray]
"""Distance in metres of (N, 2) points from the nearest thing to keep clear of; negative outside."""


class NoStart(ValueError):
    """A place without room or light for a clip."""


@dataclass(frozen=True, eq=False)
class Shot:
    """A rendered path: frames (F, H, W, 3) uint8 RGB and c2w (F, 4, 4); where it was asked for, depth (F, H, W) in
    metres along the optical axis."""

    frames: np.ndarray
    c2w: np.ndarray
    depth: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Path:
    """A camera's motion over a floor: `position` (F, 2) m, `yaw`, `pitch` (up), `roll` (clockwise) (F,) radians, `eye`
    (F,) metres above the floor; `actions` where it came from the action language, at ACTION_SPEEDS."""

    kind: str
    position: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    roll: np.ndarray
    eye: np.ndarray
    actions: str | None = None

    def __len__(self) -> int:
        return len(self.yaw)

    def placed(self, position: np.ndarray, yaw: float) -> Path:
        """This path, turned and moved so that the start of its plan comes to `position` (2,) and `yaw`."""
        (c, s), p = (math.cos(yaw), math.sin(yaw)), self.position
        turned = np.stack([c * p[:, 0] - s * p[:, 1], s * p[:, 0] + c * p[:, 1]], axis=1)
        return replace(self, position=turned + position, yaw=self.yaw + yaw)

    def taken(self, at: np.ndarray) -> Path:
        """The path at fractional frames `at`."""
        frames = np.arange(len(self))
        columns = {name: np.interp(at, frames, getattr(self, name)) for name in ("yaw", "pitch", "roll", "eye")}
        position = np.stack([np.interp(at, frames, axis) for axis in self.position.T], axis=1)
        return replace(self, position=position, **columns)

    def c2w(self, height: np.ndarray) -> np.ndarray:
        """(F, 4, 4) float64 poses of cameras at `height` (F,) metres."""
        poses = np.tile(np.eye(4), (len(self), 1, 1))
        c, s, zero = np.cos(self.yaw), np.sin(self.yaw), np.zeros(len(self))
        upright = np.stack([s, zero, c, zero, zero + 1, zero, -c, zero, s], axis=1).reshape(-1, 3, 3)
        c, s, one = np.cos(self.pitch), np.sin(self.pitch), zero + 1
        pitch = np.stack([one, zero, zero, zero, c, -s, zero, s, c], axis=1).reshape(-1, 3, 3)
        c, s = np.cos(self.roll), np.sin(self.roll)
        roll = np.stack([c, -s, zero, s, c, zero, zero, zero, one], axis=1).reshape(-1, 3, 3)
        poses[:, :3, :3] = upright @ pitch @ roll
        poses[:, :3, 3] = np.stack([self.position[:, 0], -height, self.position[:, 1]], axis=1)
        return poses


def random_path(frames: int, rng: np.random.Generator, fps: float = FPS, kind: str | None = None) -> Path:
    """A path of one of KINDS (drawn by its share when None) that starts at the plan's origin and looks east."""
    kind = kind or str(rng.choice(list(KINDS), p=np.array(list(KINDS.values()))))
    if kind not in KINDS:
        raise ValueError(f"unknown kind of path {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "return":
        return replace(there_and_back(random_path(frames, rng, fps, "walk")), kind=kind)
    if kind == "actions":
        return _from_actions(random_actions(frames - 1, int(rng.integers(2**31))), frames, rng, fps)
    speed, sign = rng.uniform(0.4, 1.2), rng.choice([-1.0, 1.0])
    pace = speed * (1 + 0.25 * drift(frames, rng, 1.0 * fps))
    turn = rng.normal() * TURN / 2 + TURN * 0.8 * drift(frames, rng, 0.7 * fps)
    none = np.zeros(frames)
    forward, left, rate = {
        "walk": (pace, 0.1 * pace * drift(frames, rng, fps), turn),
        "strafe": (0.3 * pace * drift(frames, rng, fps), sign * pace, 0.5 * turn),
        "turn": (0.08 * drift(frames, rng, fps), none, sign * np.abs(turn + sign * TURN * 1.2)),
        "back": (-pace, 0.1 * pace * drift(frames, rng, fps), 0.7 * turn),
        # Walking sideways round a point 2 to 5 m ahead.
        "orbit": (0.1 * pace * drift(frames, rng, fps), sign * pace, -sign * pace / rng.uniform(2, 5)),
        "still": (none, none, none),
    }[kind]
    if kind == "still":
        return _integrate(kind, none, none, none, none, none, none + rng.uniform(1.35, 1.55), fps)
    return _integrate(kind, forward, left, rate, *_sway(frames, rng, fps), fps)


def fan(frames: int = 81, fps: float = FPS, speed: float = SPEED, turn: float = TURN) -> list[Path]:
    """The eight clearly different motions of FAN from one pose, level and at one height."""
    forward = (1, -1, 0, 0, 0, 0, 1, 1)
    left = (0, 0, 1, -1, 0, 0, 0, 0)
    yaw = (0, 0, 0, 0, 1, -1, 1, -1)
    one, none = np.ones(frames), np.zeros(frames)
    return [
        _integrate(name, f * speed * one, s * speed * one, y * turn * one, none, none, none + 1.45, fps)
        for name, f, s, y in zip(FAN, forward, left, yaw, strict=True)
    ]


def there_and_back(path: Path) -> Path:
    """Half of `path` forth and the same way back, slowing down to turn: frame k equals frame F - 1 - k."""
    half = (len(path) - 1) / 2
    offset = np.abs(np.arange(len(path)) - half)
    rounding = min(4.0, half / 4)
    return path.taken(math.hypot(half, rounding) - np.hypot(offset, rounding))


def wander(
    frames: int,
    rng: np.random.Generator,
    clearance: Clearance,
    start: np.ndarray,
    fps: float = FPS,
    margin: float = 0.5,
) -> Path:
    """A long walk from `start` (2,) m that steers towards free space and now and then stops to look around.

    A third of the walks go back on their way from the middle. The caller checks the clearance that was kept: smoothing
    may cut a corner by a little.
    """
    back = rng.random() < 1 / 3
    count = frames // 2 + 1 if back else frames
    drifting, pace = (
        0.6 * TURN * drift(count, rng, 1.5 * fps),
        rng.uniform(0.6, 1.1) * (1 + 0.2 * drift(count, rng, fps)),
    )
    looks = _looks(count, rng, fps)
    bearings, reach = np.radians(np.arange(-75, 76, 15)), np.array([0.5, 1.0, 1.5, 2.2, 3.0])
    position, yaw, speed, rate = np.array(start, dtype=float), _freest(clearance, start, rng), 0.0, 0.0
    positions, yaws = np.empty((count, 2)), np.empty(count)
    for frame in range(count):
        positions[frame], yaws[frame] = position, yaw
        angle = yaw + bearings
        rays = position + reach[None, :, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None]
        free = clearance(rays.reshape(-1, 2)).reshape(len(bearings), -1) > margin + 0.15
        open_for = np.where(free.all(axis=1), reach[-1], reach[free.argmin(axis=1)] - reach[0])
        best = bearings[np.argmax(open_for - 0.6 * np.abs(bearings - 0.8 * drifting[frame]))]
        if open_for.max() < 0.6:
            best = bearings[-1]  # a dead end: turn round
        ahead = open_for[len(bearings) // 2]
        wanted = np.clip(1.2 * best + drifting[frame], -MAX_TURN * 0.8, MAX_TURN * 0.8)
        aim = min(pace[frame], 0.9 * ahead) if not looks[frame] else 0.0
        rate += 0.12 * ((looks[frame] or wanted) - rate)
        speed += 0.12 * (aim - speed)
        yaw += rate / fps
        step = position + speed / fps * np.array([math.cos(yaw), math.sin(yaw)])
        if clearance(step[None])[0] >= margin:
            position = step
        else:
            speed *= 0.5
    plan = np.stack([smooth(axis, 0.2 * fps) for axis in positions.T], axis=1)
    path = Path("wander", plan, smooth(yaws, 0.2 * fps), *_sway(count, rng, fps))
    if not back:
        return path
    half = np.abs(np.arange(frames) - (frames - 1) / 2)
    return replace(path.taken((frames - 1) / 2 - half), kind="wander return")


def drift(frames: int, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """(frames,) Gaussian noise of unit variance, smoothed over `sigma` frames."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(rng.normal(size=frames + 2 * reach), kernel / np.linalg.norm(kernel), mode="valid")


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """(F,) values smoothed over `sigma` frames, the ends continued as they are."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def _integrate(
    kind: str,
    forward: np.ndarray,
    left: np.ndarray,
    rate: np.ndarray,
    pitch: np.ndarray,
    roll: np.ndarray,
    eye: np.ndarray,
    fps: float,
) -> Path:
    """Velocities (F,) in m/s and rad/s, the last unused, to a path from the plan's origin."""
    shorten = np.minimum(1, MAX_SPEED / np.maximum(np.hypot(forward, left), 1e-9))
    yaw = np.concatenate([[0.0], np.cumsum(np.clip(rate, -MAX_TURN, MAX_TURN)[:-1] / fps)])
    middle = (yaw[:-1] + yaw[1:]) / 2
    f, s = (forward * shorten)[:-1] / fps, (left * shorten)[:-1] / fps
    steps = np.stack([f * np.cos(middle) - s * np.sin(middle), f * np.sin(middle) + s * np.cos(middle)], axis=1)
    position = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return Path(kind, position, yaw, pitch, roll, eye)


def _sway(frames: int, rng: np.random.Generator, fps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slow pitch, roll and height; a third of the paths are level."""
    level = rng.random() < 1 / 3
    pitch = (
        np.zeros(frames) if level else rng.normal() * math.radians(2) + math.radians(2) * drift(frames, rng, 1.5 * fps)
    )
    roll = np.zeros(frames) if level else math.radians(0.8) * drift(frames, rng, 1.5 * fps)
    eye = rng.uniform(1.35, 1.55) + (0.0 if level else 0.03) * drift(frames, rng, 1.5 * fps)
    return np.clip(pitch, -MAX_PITCH, MAX_PITCH), np.clip(roll, -MAX_ROLL, MAX_ROLL), np.clip(eye, 1.3, 1.6)


def _from_actions(text: str, frames: int, rng: np.random.Generator, fps: float) -> Path:
    """The action language's trajectory, which is level."""
    speed, turn = ACTION_SPEEDS["translation_speed"], ACTION_SPEEDS["rotation_speed"]
    poses = parse_actions(text, fps=fps, translation_speed=speed, rotation_speed=turn).c2w.double().numpy()
    position = np.stack([poses[:, 2, 3], -poses[:, 0, 3]], axis=1)
    yaw = np.unwrap(-np.arctan2(poses[:, 0, 2], poses[:, 2, 2]))
    none = np.zeros(frames)
    return Path("actions", position, yaw, none, none, none + rng.uniform(1.35, 1.55), actions=text)


def _looks(frames: int, rng: np.random.Generator, fps: float) -> np.ndarray:
    """Yaw rate (frames,) while looking around, 0 while walking: 2 to 4 s of it every 8 to 20 s."""
    rates, at = np.zeros(frames), int(rng.uniform(4, 16) * fps)
    while at < frames:
        until = at + int(rng.uniform(2, 4) * fps)
        rates[at:until] = rng.choice([-1, 1]) * rng.uniform(0.8, 1.6) * TURN
        at = until + int(rng.uniform(8, 20) * fps)
    return rates


def _freest(clearance: Clearance, start: np.ndarray, rng: np.random.Generator) -> float:
    """The yaw towards which most is open, of sixteen."""
    angles = rng.uniform(0, 2 * math.pi) + np.arange(16) * math.pi / 8
    rays = start + np.arange(0.5, 5, 0.5)[None, :, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None]
    free = clearance(rays.reshape(-1, 2)).reshape(16, -1) > 0.6
    return float(angles[np.argmax(np.cumprod(free, axis=1).sum(axis=1))])

"""Scores of one video, from its frames and its camera alone; no true video is needed. `SCORES` lists them.

`follow` tracks points from frame to frame and asks of each whether a point of positive depth, seen by the two cameras,
could have moved so. Rotation leaves one place for it, translation a segment of the epipolar line that begins there.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

WEIGHTS = {"follow": 0.6, "sharpness": 0.2, "drift": -0.2}
_GAP_SECONDS = 0.5
_MAX_PAIRS = 12
_MAX_POINTS = 200
_TOLERANCE = 0.005  # of the image's width: an error that halves a point's weight
_REFERENCE_DEPTH = 10.0  # metres; half of a scene that moves less than if it were this far does not move enough
_INVERSE_DEPTHS = np.concatenate([[0.0], np.geomspace(1 / 200, 1 / 0.2, 48)])


def score(
    frames: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray, fps: float, numbers: np.ndarray | None = None
) -> dict[str, float]:
    """All of `SCORES`, each in [0, 1].

    frames: (F, H, W, 3) uint8. c2w: (F, 4, 4) OpenCV, metres. intrinsics: (F, 4) in pixels of the frames.
    numbers: (F,) places of the frames in their video, ascending, when they are a part of it.
    """
    return {name: function(frames, c2w, intrinsics, fps, numbers) for name, function in SCORES.items()}


def total(scores: Mapping[str, float], weights: Mapping[str, float] = WEIGHTS) -> float:
    """The weighted sum, scaled to [0, 1]; 0 without weights. Scores without one do not count."""
    found = sum(weight * scores[name] for name, weight in weights.items())
    worst, best = sum(w for w in weights.values() if w < 0), sum(w for w in weights.values() if w > 0)
    return (found - worst) / ((best - worst) or 1)


def follow(
    frames: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray, fps: float, numbers: np.ndarray | None = None
) -> float:
    """Share of points that move as the camera says, in [0, 1]: mean over pairs of frames half a second apart."""
    gap = min(max(1, round(fps * _GAP_SECONDS)), len(frames) - 1)
    if gap < 1:
        return 0.0
    starts = np.arange(len(frames) - gap)
    if numbers is not None:
        starts = starts[numbers[gap:] - numbers[:-gap] == gap]  # no pair across a cut
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, _MAX_PAIRS).round().astype(int))]
    return float(np.mean([_pair(frames, c2w, intrinsics, int(i), int(i) + gap) for i in starts]))


def _pair(frames: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray, first: int, second: int) -> float:
    grey = cv2.cvtColor(frames[first], cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    found = cv2.goodFeaturesToTrack(grey, _MAX_POINTS, qualityLevel=0.01, minDistance=max(3, width // 40))
    if found is None or len(found) < 8:
        return 0.0
    points = found.reshape(-1, 2).astype(np.float32)
    # OpenCV counts from the first pixel's centre, the intrinsics from its edge.
    paths = _paths(points + 0.5, c2w[first], c2w[second], intrinsics[first], intrinsics[second]) - 0.5
    reference = int(np.argmin(np.abs(_INVERSE_DEPTHS - 1 / _REFERENCE_DEPTH)))
    far, near = paths[:, 0], paths[:, reference]
    inside = np.all((far > 2) & (near > 2) & (far < (width - 3, height - 3)) & (near < (width - 3, height - 3)), axis=1)
    if inside.sum() < 8:
        return 0.0
    points, paths, far, near = points[inside], paths[inside], far[inside], near[inside]
    moved, kept = _track(frames[first : second + 1], points)
    tolerance = _TOLERANCE * width
    distance = np.linalg.norm(paths - moved[:, None], axis=-1)
    error = np.nanmin(np.where(np.isnan(distance), np.inf, distance), axis=1)
    consistent = np.where(kept, 1 / (1 + (error / tolerance) ** 2), 0).mean()
    return float(consistent) * _parallax(moved[kept], far[kept], near[kept], tolerance)


def _paths(points: np.ndarray, c2w1: np.ndarray, c2w2: np.ndarray, k1: np.ndarray, k2: np.ndarray) -> np.ndarray:
    """Where points (N, 2) of one frame lie in the other, for each inverse depth: (N, D, 2), NaN behind the camera."""
    relative = np.linalg.inv(c2w2.astype(np.float64)) @ c2w1.astype(np.float64)
    rays = np.concatenate([(points - k1[2:]) / k1[:2], np.ones((len(points), 1))], axis=1) @ relative[:3, :3].T
    seen = rays[:, None] + _INVERSE_DEPTHS[:, None] * relative[:3, 3]
    depth = np.where(seen[..., 2:] > 0.05, seen[..., 2:], np.nan)
    return seen[..., :2] / depth * k2[:2] + k2[2:]


def _track(frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 2) in the last frame, and which points came back to their start when tracked in reverse."""
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[:: max(1, len(frames) // 4)]]
    if (len(frames) - 1) % max(1, len(frames) // 4):
        greys.append(cv2.cvtColor(frames[-1], cv2.COLOR_RGB2GRAY))
    kept = np.ones(len(points), dtype=bool)
    there = points.reshape(-1, 1, 2)
    for before, after in zip(greys, greys[1:], strict=False):
        there, kept = _step(before, after, there, kept)
    back = there
    for before, after in zip(greys[::-1], greys[-2::-1], strict=False):
        back, kept = _step(before, after, back, kept)
    returned = np.linalg.norm((back - points.reshape(-1, 1, 2)).reshape(-1, 2), axis=1) < 1.5
    return there.reshape(-1, 2), kept & returned


def _step(before: np.ndarray, after: np.ndarray, points: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved, status, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, winSize=(21, 21), maxLevel=3)  # type: ignore[call-overload]
    return moved, kept & (status.reshape(-1) == 1)


def _parallax(moved: np.ndarray, far: np.ndarray, near: np.ndarray, tolerance: float) -> float:
    """1 where half of the points move with a translation at least as those at the reference depth, 0 where none do.

    Without this a still picture would follow every straight path: a point at infinity does not move.
    """
    expected = near - far
    length = np.linalg.norm(expected, axis=1)
    if len(moved) == 0 or np.median(length) < tolerance / 4:
        return 1.0
    clear = length > tolerance / 4
    along = ((moved - far)[clear] * expected[clear]).sum(1) / length[clear] ** 2
    return float(np.clip(np.median(along), 0, 1))


def sharpness(frames: np.ndarray) -> float:
    """Mean over frames (F, H, W, 3) of the variance of the Laplacian of grey values."""
    return float(np.mean([cv2.Laplacian(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var() for f in frames]))


def drift(
    frames: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray, fps: float, numbers: np.ndarray | None = None
) -> float:
    """Change of colour and sharpness from the first second to the last, in [0, 1]; less is better."""
    second = max(1, round(fps))
    return min(1.0, color_drift(frames[:second], frames[-second:]) + _sharpness_part(frames, second))


def relative_sharpness(frames: np.ndarray, *_: object) -> float:
    """Sharpness of the frames after the first against the first, in [0, 1]; noise counts against it as blur does."""
    ratio = (sharpness(frames[1::4] if len(frames) > 4 else frames) + 1e-6) / (sharpness(frames[:1]) + 1e-6)
    return min(ratio, 1 / ratio)


def sharpness_drift(first: np.ndarray, last: np.ndarray) -> float:
    """Relative change of sharpness from one second of frames to another, >= 0."""
    before = sharpness(first)
    return abs(sharpness(last) - before) / max(before, 1e-6)


def color_drift(first: np.ndarray, last: np.ndarray) -> float:
    """Relative change of mean and spread of the three colours from one second of frames to another, >= 0."""
    before, after = (np.stack([part.mean((0, 1, 2)), part.std((0, 1, 2))]) for part in (first, last))
    return float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-6))


def _sharpness_part(frames: np.ndarray, second: int) -> float:
    """Half of the sharpness lost or gained; the camera's own motion changes it too."""
    ratio = (sharpness(frames[-second:]) + 1e-6) / (sharpness(frames[:second]) + 1e-6)
    return 0.5 * (1 - min(ratio, 1 / ratio))


# Each takes what `score` does.
SCORES = {"follow": follow, "sharpness": relative_sharpness, "drift": drift}

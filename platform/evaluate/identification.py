"""Which of a start's eight true renderings is a generated video? The one whose camera it followed, if it followed any.

All eight begin at the same place with the same picture, so only the camera's path tells them apart. Pixels are compared
after a light blur and with each frame's brightness made equal; large differences are clipped, so that a few wrongly
placed edges do not outvote the rest. Frame 0 is the same in all and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

_BLUR_SIGMA = 1.5  # pixels
_CLIP = 48.0  # grey levels
_MEAN = 128.0


def fans(keys: Iterable[str]) -> dict[str, list[str]]:
    """The renderings of each start, from keys START/0, START/1 ...; sorted. ValueError when their numbers differ."""
    found: dict[str, list[str]] = {}
    for key in keys:
        start, slash, index = key.rpartition("/")
        if not slash or not index.isdigit():
            raise ValueError(f"clip {key!r} is not of a fan: keys must be START/0, START/1 ...")
        found.setdefault(start, []).append(key)
    sizes = {len(renderings) for renderings in found.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"each start needs the same number of renderings, at least 2; here there are {sorted(sizes)}")
    return {start: sorted(found[start], key=lambda key: int(key.rpartition("/")[2])) for start in sorted(found)}


def prepare(frames: np.ndarray) -> np.ndarray:
    """Frames after the first, float32 (F - 1, H, W, 3), blurred, of equal mean brightness."""
    blurred = np.stack([cv2.GaussianBlur(frame.astype(np.float32), (0, 0), _BLUR_SIGMA) for frame in frames[1:]])
    return blurred * (_MEAN / np.maximum(blurred.mean((1, 2, 3), keepdims=True), 1.0))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over frames, pixels and colours of the clipped |difference| of prepared frames."""
    return float(np.mean([np.minimum(np.abs(a - b), _CLIP).mean() for a, b in zip(one, other, strict=True)]))


def identify(generated: np.ndarray, renderings: Sequence[np.ndarray]) -> tuple[int, list[float]]:
    """The index of the nearest rendering, and all distances. Videos: (F, H, W, 3) uint8 of one shape."""
    prepared = prepare(generated)
    distances = [distance(prepared, prepare(rendering)) for rendering in renderings]
    return int(np.argmin(distances)), distances


def path_errors(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Means over frames of the angle in degrees and the distance in metres between two paths of cameras.

    Camera-to-world (F, 4, 4) each, seen from their first frames: RotErr and TransErr of SANA-WM section 6, unaligned.
    """
    one, other = (np.linalg.inv(path[0]) @ path for path in (one.astype(np.float64), other.astype(np.float64)))
    cosine = (np.einsum("fij,fij->f", one[:, :3, :3], other[:, :3, :3]) - 1) / 2
    distance = np.linalg.norm(one[:, :3, 3] - other[:, :3, 3], axis=1)
    return float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean()), float(distance.mean())


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 videos of one shape; of equal ones, that of half a grey level's error."""
    error = np.mean([((a.astype(np.float32) - b) ** 2).mean() for a, b in zip(one, other, strict=True)])
    return float(10 * np.log10(255**2 / max(float(error), 0.25)))

"""From a finely rendered picture to pixels, by the filter that offline renderers use."""

from __future__ import annotations

import cv2
import numpy as np

_SIGMA = 0.5  # pixels; PBRT's default. A box alone leaves texture that flickers as the camera moves.


def pixels_of(fine: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`fine` (s H, s W, 3), an integer s, as a picture of `size` (H, W): averaged over each pixel, then a Gaussian."""
    return cv2.GaussianBlur(cv2.resize(fine, size[::-1], interpolation=cv2.INTER_AREA), (0, 0), _SIGMA)

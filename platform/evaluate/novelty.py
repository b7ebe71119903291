"""How unlike others a video is, from descriptors small enough to be kept with its scores."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

_MOMENTS, _SIZE = 4, (4, 6)  # after the first frame, which candidates share; height and width


def describe(frames: np.ndarray) -> str:
    """Colours of coarse fields at a quarter, half, three quarters and the end of frames (F, H, W, 3) uint8, as
    hexadecimal bytes.
    """
    moments = np.linspace(0, len(frames) - 1, _MOMENTS + 1).round().astype(int)[1:]
    small = [cv2.resize(frames[moment], _SIZE[::-1], interpolation=cv2.INTER_AREA) for moment in moments]
    return np.stack(small).tobytes().hex()


def novelty(descriptors: Sequence[str]) -> list[float]:
    """Of each video among the others, in [0, 1]: its mean distance from them; 0 where there are no others.

    The distance of two is the root mean square difference of their fields, as a share of the largest there can be.
    """
    fields = np.stack([np.frombuffer(bytes.fromhex(each), np.uint8) for each in descriptors]).astype(np.float64) / 255
    distances = [np.sqrt(np.square(fields - one).mean(1)) for one in fields]
    # Summed in order of size, so that the order of the videos does not tell in the last bits.
    return [float(np.sort(each).sum() / max(1, len(fields) - 1)) for each in distances]

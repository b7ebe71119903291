"""Clip: a video with the camera of every frame, the unit that all corpora and renderers are turned into."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from longtake.model.camera import Trajectory

Split = Literal["train", "test"]
SPLITS = ("train", "test")


@dataclass(eq=False)
class Clip:
    """A camera-posed video.

    key: unique in a store. frames: (F, H, W, 3) uint8 RGB. c2w: (F, 4, 4) float32 camera-to-world, OpenCV axes (+x
    right, +y down, +z forward), metres x `metric_scale`. intrinsics: (F, 4) float32 fx, fy, cx, cy in pixels of the
    frames; pixel coordinates run from 0 at the image's left (top) edge to W (H) at its right (bottom) edge, so that
    the centre of pixel (column j, row i) is (j + 0.5, i + 0.5), a centred principal point is (W / 2, H / 2), and
    resizing by a factor multiplies all four by it. metric_scale: factor from the poses' unit to metres. licence: an
    SPDX identifier or a name, by which stores are filtered. provenance: how the clip came to be, as JSON values.
    actions: the key sequence of the trajectory in the action language, where it came from one.

    ValueError for arrays of another shape or dtype, poses that are not finite, and an unknown split.
    """

    key: str
    frames: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    fps: float
    caption: str
    metric_scale: float
    licence: str
    provenance: dict[str, Any] = field(default_factory=dict)
    split: Split = "train"
    actions: str | None = None

    def __post_init__(self) -> None:
        num = len(self.frames)
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3 or num == 0:
            raise ValueError(
                f"clip {self.key!r}: frames must be uint8 (F, H, W, 3), not {self.frames.dtype} {self.frames.shape}"
            )
        self.c2w = np.asarray(self.c2w, dtype=np.float32)
        self.intrinsics = np.asarray(self.intrinsics, dtype=np.float32)
        for name, array, shape in (("c2w", self.c2w, (num, 4, 4)), ("intrinsics", self.intrinsics, (num, 4))):
            if array.shape != shape:
                raise ValueError(f"clip {self.key!r}: {name} must be {shape} for {num} frames, not {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"clip {self.key!r}: {name} has values that are not finite")
        if self.split not in SPLITS:
            raise ValueError(f"clip {self.key!r}: split must be one of {SPLITS}, not {self.split!r}")
        if not self.fps > 0 or not self.metric_scale > 0:
            raise ValueError(f"clip {self.key!r}: fps {self.fps} and metric scale {self.metric_scale} must be positive")
        json.dumps(self.provenance)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    def trajectory(self) -> Trajectory:
        """The camera of every frame, in metres."""
        import torch

        from longtake.model.camera import Trajectory

        c2w = self.c2w.copy()
        c2w[:, :3, 3] *= self.metric_scale
        return Trajectory(
            torch.from_numpy(c2w),
            torch.from_numpy(self.intrinsics.copy()),
            image_size=self.image_size,
            fps=self.fps,
            actions=self.actions,
        )

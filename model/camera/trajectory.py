"""A camera's way through the world: a pose and a pinhole for every raw frame."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.model.camera.features import CameraFeatures, camera_features
from longtake.model.camera.pose import check_fov, check_poses, relative_to_first


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Checked on construction.

    c2w: (F, 4, 4) float32 camera-to-world, OpenCV axes, metres. intrinsics: (F, 4), or (4,) for all frames: fx, fy, cx,
    cy in pixels of image_size. image_size: (height, width); without it, twice the principal point is taken for it.
    actions: the key sequence that the trajectory came from, if any.

    ValueError for poses that are not rigid or not finite, intrinsics of another length, and a field of view outside 25
    to 120 degrees.
    """

    c2w: Tensor
    intrinsics: Tensor
    image_size: tuple[int, int] | None = None
    fps: float = 16.0
    actions: str | None = None

    def __post_init__(self) -> None:
        c2w = torch.as_tensor(self.c2w, dtype=torch.float32)
        intrinsics = torch.as_tensor(self.intrinsics, dtype=torch.float32)
        check_poses(c2w)
        if intrinsics.shape == (4,):
            intrinsics = intrinsics.expand(len(c2w), 4)
        if intrinsics.shape != (len(c2w), 4):
            raise ValueError(
                f"intrinsics must be (4,) or ({len(c2w)}, 4) for {len(c2w)} poses, not {tuple(intrinsics.shape)}"
            )
        if not intrinsics.isfinite().all() or not (intrinsics > 0).all():
            raise ValueError("intrinsics must be finite and positive: fx, fy, cx, cy in pixels")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, not {self.fps}")
        height, width = self.image_size or tuple((2 * intrinsics[0, [3, 2]]).tolist())
        for size, focal in ((width, intrinsics[:, 0]), (height, intrinsics[:, 1])):
            for value in (focal.min(), focal.max()):
                check_fov_of(size, float(value), wide=size == width)
        object.__setattr__(self, "c2w", c2w)
        object.__setattr__(self, "intrinsics", intrinsics)

    @property
    def num_frames(self) -> int:
        return len(self.c2w)

    @property
    def duration(self) -> float:
        """Seconds that the frames are shown."""
        return self.num_frames / self.fps

    def relative(self) -> Trajectory:
        """The same way seen from its first camera."""
        return dataclasses.replace(self, c2w=relative_to_first(self.c2w))

    def window(self, start: int, stop: int) -> Trajectory:
        """Frames [start, stop). ValueError when there are none."""
        if not 0 <= start < stop <= self.num_frames:
            raise ValueError(f"frames [{start}, {stop}) are not within the trajectory's {self.num_frames}")
        return dataclasses.replace(self, c2w=self.c2w[start:stop], intrinsics=self.intrinsics[start:stop], actions=None)

    def resized(self, image_size: tuple[int, int]) -> Trajectory:
        """Intrinsics for images that are scaled and centre-cropped to image_size (height, width)."""
        if self.image_size is None or tuple(self.image_size) == tuple(image_size):
            return dataclasses.replace(self, image_size=image_size)
        (height, width), (new_height, new_width) = self.image_size, image_size
        scale = max(new_height / height, new_width / width)
        crop = torch.tensor([0, 0, (width * scale - new_width) / 2, (height * scale - new_height) / 2])
        return dataclasses.replace(self, intrinsics=self.intrinsics * scale - crop, image_size=image_size)

    def features(self, image_size: tuple[int, int], vae_stride: tuple[int, int, int]) -> CameraFeatures:
        """What the network reads, batch 1. ValueError unless there are vae_stride[0] k + 1 frames."""
        resized = self.resized(image_size)
        return camera_features(resized.c2w[None], resized.intrinsics[None], image_size, vae_stride)

    def save(self, path: str | Path) -> None:
        """Write a .npz that `load` reads."""
        size = np.asarray(self.image_size if self.image_size else (), dtype=np.int64)
        with open(path, "wb") as file:
            np.savez(
                file,
                c2w=self.c2w.numpy(),
                intrinsics=self.intrinsics.numpy(),
                image_size=size,
                fps=self.fps,
                actions=self.actions or "",
            )

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """The inverse of `save`. ValueError when the file is something else."""
        arrays = _read_arrays(path)
        if isinstance(arrays, np.ndarray):
            raise ValueError(f"{path} is a single array, no saved trajectory: name it .npy, or use Trajectory.save")
        try:
            size = tuple(int(side) for side in arrays["image_size"])
            return cls(
                torch.from_numpy(arrays["c2w"]),
                torch.from_numpy(arrays["intrinsics"]),
                image_size=(size[0], size[1]) if size else None,
                fps=float(arrays["fps"]),
                actions=str(arrays["actions"]) or None,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is not a saved trajectory ({error}): write one with Trajectory.save") from None

    @classmethod
    def from_npy(
        cls, path: str | Path, intrinsics: Tensor, image_size: tuple[int, int] | None = None, fps: float = 16.0
    ) -> Trajectory:
        """Poses c2w (F, 4, 4) from a .npy file."""
        c2w = _read_arrays(path)
        if not isinstance(c2w, np.ndarray) or c2w.dtype.kind not in "fiu":
            raise ValueError(f"{path} must hold one array of numbers, c2w (frames, 4, 4)")
        try:
            return cls(torch.from_numpy(c2w.astype(np.float32)), intrinsics, image_size, fps)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def plot(self, path: str | Path) -> None:
        """Draw the way from above and from the side, a view cone every second, as the format of the path's suffix."""
        from matplotlib.figure import Figure

        poses = relative_to_first(self.c2w)
        figure = Figure(figsize=(9, 4), layout="constrained")
        views = (("from above", 0, 2, "right (m)", "forward (m)"), ("from the side", 2, 1, "forward (m)", "down (m)"))
        for axes, (title, across, up, label_x, label_y) in zip(figure.subplots(1, 2), views, strict=True):
            axes.plot(poses[:, across, 3], poses[:, up, 3], color="tab:blue", linewidth=1.5)
            marks = poses[:: max(1, round(self.fps))]
            axes.quiver(
                marks[:, across, 3], marks[:, up, 3], marks[:, across, 2], marks[:, up, 2],
                range(len(marks)), angles="xy", cmap="viridis", width=0.006,
            )  # fmt: skip
            axes.plot(0, 0, "o", color="tab:green", label="start")
            axes.set(title=title, xlabel=label_x, ylabel=label_y)
            axes.set_aspect("equal", adjustable="datalim")
            axes.grid(alpha=0.3)
            axes.legend(loc="best", fontsize=8)
            if up == 1:
                axes.invert_yaxis()
        figure.savefig(path, dpi=110)


def check_fov_of(size: float, focal: float, wide: bool) -> None:
    """ValueError when `size` pixels behind `focal` pixels are a view outside the trained range (vertically: wider than
    120).
    """
    degrees = math.degrees(2 * math.atan(size / 2 / focal))
    if wide:
        check_fov(degrees)
    elif degrees > 120:
        raise ValueError(f"a vertical field of view of {degrees:.1f} degrees is above 120: change the focal length")


def _read_arrays(path: str | Path):  # noqa: ANN202  (an array, or an archive of arrays)
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"there is no trajectory at {path}") from None
    except (ValueError, OSError, EOFError):  # NumPy takes any other file for pickled objects, and says so
        raise ValueError(f"{path} holds no arrays of numbers: write it with numpy.save or Trajectory.save") from None

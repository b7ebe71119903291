"""Rigid motions and pinholes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def invert(pose: Tensor) -> Tensor:
    """The inverse of rigid motions (..., 4, 4), in closed form."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    out = torch.zeros_like(pose)
    out[..., :3, :3] = rotation
    out[..., :3, 3:] = -rotation @ pose[..., :3, 3:]
    out[..., 3, 3] = 1
    return out


def relative_to_first(c2w: Tensor) -> Tensor:
    """Poses (..., F, 4, 4) in the frame of the first camera, whose own pose becomes exactly the identity."""
    relative = invert(c2w[..., :1, :, :]) @ c2w
    return torch.cat(
        [torch.eye(4, device=c2w.device).expand_as(relative[..., :1, :, :]), relative[..., 1:, :, :]], dim=-3
    )


def intrinsics_from_fov(horizontal_fov_deg: float, image_size: tuple[int, int]) -> Tensor:
    """fx, fy, cx, cy (4,) of a centred pinhole with square pixels; image_size is (height, width).

    ValueError outside 25 to 120 degrees, the range that the model is trained on.
    """
    check_fov(horizontal_fov_deg)
    height, width = image_size
    focal = width / 2 / math.tan(math.radians(horizontal_fov_deg) / 2)
    return torch.tensor([focal, focal, width / 2, height / 2])


def check_fov(degrees: float) -> None:
    """ValueError unless the field of view is between 25 and 120 degrees."""
    if not 25 <= degrees <= 120:
        raise ValueError(
            f"a horizontal field of view of {degrees:.1f} degrees is outside 25 to 120: change it, or the focal length"
        )


def check_poses(c2w: Tensor, tolerance: float = 1e-3) -> None:
    """ValueError naming the first frame of c2w (F, 4, 4) that is not a finite rigid motion."""
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or len(c2w) == 0:
        raise ValueError(f"c2w must be (frames, 4, 4), not {tuple(c2w.shape)}")
    rotation = c2w[:, :3, :3]
    identity = torch.eye(3, dtype=c2w.dtype)
    for problem, bad, advice in (
        ("has values that are not finite", ~c2w.isfinite().all(-1).all(-1), "remove NaN and infinity"),
        (
            "does not end in the row 0 0 0 1",
            (c2w[:, 3] - c2w.new_tensor([0, 0, 0, 1])).abs().amax(-1) > tolerance,
            "give 4 x 4 poses",
        ),
        (
            "is not a rotation",
            (rotation @ rotation.mT - identity).abs().amax((-1, -2)) > tolerance,
            "its 3 x 3 part must be orthonormal: remove scale and shear",
        ),
        (
            "mirrors the world",
            torch.linalg.det(rotation.nan_to_num()) < 0,
            "use right-handed OpenCV axes (x right, y down, z forward)",
        ),
    ):
        if bad.any():
            raise ValueError(f"c2w of frame {int(bad.nonzero()[0])} {problem}: {advice}")

"""Cameras: the only place for conventions and units.

Poses are camera-to-world (c2w), OpenCV axes (+x right, +y down, +z forward), metres, float32. Intrinsics are fx, fy,
cx, cy in pixels, where pixel coordinates run from 0 at the image's left (top) edge to its width (height) at the right
(bottom) edge.
"""

from longtake.model.camera.actions import (
    KEY_MAPS,
    KeyMap,
    Motion,
    Steering,
    actions_length,
    parse_actions,
    random_actions,
    repeated_actions,
    split_actions,
)
from longtake.model.camera.features import CameraFeatures, camera_features, plucker_rays, ray_matrices
from longtake.model.camera.pose import intrinsics_from_fov, invert, relative_to_first
from longtake.model.camera.trajectory import Trajectory

__all__ = [
    "actions_length",
    "KEY_MAPS",
    "CameraFeatures",
    "KeyMap",
    "Motion",
    "Steering",
    "Trajectory",
    "camera_features",
    "intrinsics_from_fov",
    "invert",
    "parse_actions",
    "plucker_rays",
    "random_actions",
    "ray_matrices",
    "relative_to_first",
    "repeated_actions",
    "split_actions",
]

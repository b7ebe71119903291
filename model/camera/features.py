"""What the network reads of a camera: a pose and a pinhole for each latent frame, Pluecker rays for each raw frame.

SANA-WM section 1.9. Latent frame t stands for raw frames 8 t - 7 ... 8 t; its pose is that of raw frame 8 t. Everything
is float32: in bfloat16 the poses of a minute lose centimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.model.camera.pose import invert, relative_to_first


@dataclass(frozen=True)
class CameraFeatures:
    """conditions (B, T, 20): flattened c2w relative to frame 0, then fx, fy, cx, cy in latent positions. plucker (B,
    48, T, h, w): six channels (direction, moment) for each raw frame of a latent frame. Both float32."""

    conditions: Tensor
    plucker: Tensor

    def __post_init__(self) -> None:
        if self.conditions.ndim != 3 or self.conditions.shape[-1] != 20:
            raise ValueError(f"conditions must be (B, T, 20), not {tuple(self.conditions.shape)}")
        if self.plucker.ndim != 5 or (self.plucker.shape[0], self.plucker.shape[2]) != self.conditions.shape[:2]:
            raise ValueError(
                f"plucker must be (B, channels, T, h, w) with B, T = {tuple(self.conditions.shape[:2])}, "
                f"not {tuple(self.plucker.shape)}"
            )

    def to(self, device: torch.device | str) -> CameraFeatures:
        return CameraFeatures(self.conditions.to(device), self.plucker.to(device))

    def frames(self, first: int, end: int) -> CameraFeatures:
        """Of latent frames first ... end - 1."""
        return CameraFeatures(self.conditions[:, first:end], self.plucker[:, :, first:end])

    def expand(self, batch: int) -> CameraFeatures:
        """One camera for `batch` clips."""
        return CameraFeatures(self.conditions.expand(batch, -1, -1), self.plucker.expand(batch, -1, -1, -1, -1))

    @staticmethod
    def cat(cameras: Sequence[CameraFeatures]) -> CameraFeatures:
        """Cameras of equal length in one batch."""
        return CameraFeatures(
            torch.cat([camera.conditions for camera in cameras]), torch.cat([camera.plucker for camera in cameras])
        )


def camera_features(
    c2w: Tensor, intrinsics: Tensor, image_size: tuple[int, int], vae_stride: tuple[int, int, int]
) -> CameraFeatures:
    """Features of c2w (B, F, 4, 4) and intrinsics (B, F, 4) in pixels of image_size (height, width), on their device.

    ValueError unless F = vae_stride[0] k + 1.
    """
    stride, frames = vae_stride[0], c2w.shape[1]
    if (frames - 1) % stride:
        below = frames - (frames - 1) % stride
        raise ValueError(
            f"{frames} poses do not fill whole latent frames: give {below} or {below + stride} ({stride} k + 1)"
        )
    height, width = image_size[0] // vae_stride[1], image_size[1] // vae_stride[2]
    poses = relative_to_first(c2w.float())
    scale = intrinsics.new_tensor([width / image_size[1], height / image_size[0]]).repeat(2)
    pinholes = intrinsics.float() * scale
    at = torch.arange(0, frames, stride, device=c2w.device)
    conditions = torch.cat([poses[:, at].flatten(2), pinholes[:, at]], dim=-1)
    # The first latent frame holds raw frame 0 alone; its window is clamped to the clip.
    windows = (at - stride + 1).clamp(min=0)[:, None] + torch.arange(stride, device=c2w.device)
    rays = plucker_rays(poses, pinholes, height, width)[:, windows.clamp(max=frames - 1)]
    plucker = rays.permute(0, 2, 5, 1, 3, 4).flatten(1, 2)
    return CameraFeatures(conditions, plucker)


def plucker_rays(c2w: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """(B, F, height, width, 6): unit direction d and moment o x d of the ray through each integer position, in world
    axes.
    """
    directions = F.normalize(_directions(intrinsics, height, width) @ c2w[..., None, :3, :3].mT, dim=-1)
    origins = c2w[..., None, None, :3, 3].expand_as(directions)
    return torch.cat([directions, torch.linalg.cross(origins, directions)], dim=-1)


def ray_matrices(conditions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rigid motions ray <- world and world <- ray of every latent token, (B, T, height, width, 4, 4) each.

    A ray's z is its direction, its x is normalised camera y x z, its y is z x x, its origin the camera's centre.
    """
    c2w, intrinsics = conditions[..., :16].unflatten(-1, (4, 4)), conditions[..., 16:]
    rotation = c2w[..., :3, :3]
    local = F.normalize(_directions(intrinsics, height, width), dim=-1)
    z = F.normalize(local @ rotation[..., None, :, :].mT, dim=-1)
    camera_y = rotation[..., None, None, :, 1].expand_as(z)
    x = F.normalize(torch.linalg.cross(camera_y, z), dim=-1)
    y = torch.linalg.cross(z, x)
    world_from_ray = torch.zeros(*z.shape[:-1], 4, 4, device=z.device)
    world_from_ray[..., :3, :3] = torch.stack([x, y, z], dim=-1)
    world_from_ray[..., :3, 3] = c2w[..., None, None, :3, 3]
    world_from_ray[..., 3, 3] = 1
    return invert(world_from_ray), world_from_ray


def _directions(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Camera-frame directions (..., height, width, 3) with z = 1 through integer latent positions."""
    v, u = torch.meshgrid(
        torch.arange(height, device=intrinsics.device, dtype=torch.float32),
        torch.arange(width, device=intrinsics.device, dtype=torch.float32),
        indexing="ij",
    )
    fx, fy, cx, cy = intrinsics.float()[..., None, None, :].unbind(-1)
    x, y = (u - cx) / fx, (v - cy) / fy
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)

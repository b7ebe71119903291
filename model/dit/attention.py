"""Dual-branch attention: the main branch and the camera branch, added before one gate and one projection.

Legend: B batch, T latent frames, S tokens a frame, N = T S tokens, C hidden size, H heads, D channels a head.
Parameters bear the names of the public checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.gdn.reference import frame_maps, read_states
from longtake.kernels.short_conv.reference import short_conv
from longtake.kernels.ucpe.reference import downscale_to_rms, rotate, ucpe
from longtake.model.config import SoftmaxScale, WorldModelConfig
from longtake.model.dit.time_axis import WHOLE_CLIP, TimeAxis


@dataclass
class Positions:
    """Where tokens are, the same for all blocks: rope (N, D / 2, 2), camera_rope (N, D / 4, 2), and of the camera
    ray_from_world (B, N, 4, 4) with its inverse, both float32, or None without a camera; camera_seen (B, 1, 1), false
    for clips whose camera is left out, or None where none is; the axis of all frames.
    """

    frames: int
    rope: Tensor
    camera_rope: Tensor
    ray_from_world: Tensor | None = None
    world_from_ray: Tensor | None = None
    camera_seen: Tensor | None = None
    time: TimeAxis = WHOLE_CLIP

    def seen(self, of_camera: Tensor) -> Tensor:
        """What a camera adds to the tokens, (B, N, C), where it is seen."""
        return of_camera if self.camera_seen is None else of_camera * self.camera_seen.to(of_camera.dtype)


class ShortConv(nn.Module):
    """Holds the weight of a symmetric temporal convolution, the identity at first."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size))
        nn.init.ones_(self.weight[:, :, -1])

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        x, reach = x.unflatten(1, (at.frames, -1)), self.weight.shape[-1] - 1
        return at.time.around(x, reach, lambda frames: short_conv(frames, self.weight)).flatten(1, 2)


class DualBranchAttention(nn.Module):
    """What GDN and softmax attention share: projections, norms, output gate. x (B, N, C) is the modulated input."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.heads, self.ucpe_downscale = heads, config.ucpe_downscale
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(size, 1e-5), nn.RMSNorm(size, 1e-5)
        self.q_proj_cam, self.k_proj_cam, self.v_proj_cam = (nn.Linear(size, size) for _ in range(3))
        self.q_norm_cam, self.k_norm_cam = nn.RMSNorm(size, 1e-5), nn.RMSNorm(size, 1e-5)
        self.out_proj_cam = nn.Linear(size, size)
        self.output_gate = nn.Linear(size, size)
        self.proj = nn.Linear(size, size)
        # The GDN's gates; softmax blocks of the public checkpoints carry them, unused.
        self.beta_proj, self.gate_proj = nn.Linear(size, heads), nn.Linear(size, heads)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.register_buffer("recall_gate", torch.zeros(1))
        self._initialise()

    def _initialise(self) -> None:
        self.A_log.data.uniform_(1e-3, 16).log_()
        step = (torch.rand(self.heads) * math.log(100) + math.log(1e-3)).exp()  # log-uniform in [1e-3, 0.1]
        self.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        nn.init.zeros_(self.out_proj_cam.weight)
        nn.init.zeros_(self.out_proj_cam.bias)
        nn.init.zeros_(self.output_gate.weight)
        nn.init.constant_(self.output_gate.bias, 1.278464542761074)  # SiLU of this is 1
        for own, shared in zip(
            (self.q_proj_cam, self.k_proj_cam, self.v_proj_cam), self.qkv.weight.chunk(3), strict=True
        ):
            own.weight.data.copy_(shared.data)
            nn.init.zeros_(own.bias)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        main = self._heads(*self._features(q, k, v, at, camera=False))
        camera = None
        if at.ray_from_world is not None:
            q, k, v = self.q_proj_cam(x), self.k_proj_cam(x), self.v_proj_cam(x)
            camera = self._heads(*self._features(q, k, v, at, camera=True))
        with torch.autocast(x.device.type, enabled=False):
            mixed, mixed_camera = self.mix(x, main, camera, at)
        out = mixed.to(x.dtype).flatten(2)
        if mixed_camera is not None:
            mixed_camera = ucpe(mixed_camera, at.ray_from_world, at.camera_rope, inverse_rope=True)  # type: ignore[arg-type]
            out = out + at.seen(self.out_proj_cam(mixed_camera.to(x.dtype).flatten(2)))
        return self.proj((out * F.silu(self.output_gate(x).float())).to(x.dtype))

    def mix(self, x: Tensor, main: tuple, camera: tuple | None, at: Positions) -> tuple[Tensor, Tensor | None]:
        """Attention of both branches: (q, k, v) of (B, N, H, D) to (B, N, H, D) each; the camera's still in ray
        coordinates.
        """
        raise NotImplementedError

    def _features(self, q: Tensor, k: Tensor, v: Tensor, at: Positions, camera: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys of one branch."""
        if camera:
            return self.q_norm_cam(q), self.k_norm_cam(k), v
        return self.q_norm(q), self.k_norm(k), v

    def _heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.unflatten(-1, (self.heads, -1)) for tensor in tensors)

    def to_rays(self, camera: tuple, at: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in the coordinates of their rays, float32 (B, N, H, D)."""
        assert at.ray_from_world is not None and at.world_from_ray is not None
        q, k, v = (tensor.float() for tensor in camera)
        encoded = (
            ucpe(q, at.ray_from_world.transpose(-1, -2), at.camera_rope),
            ucpe(k, at.world_from_ray, at.camera_rope),
            ucpe(v, at.world_from_ray, at.camera_rope),
        )
        if not self.ucpe_downscale:
            return encoded
        return tuple(downscale_to_rms(plain, ray) for plain, ray in zip((q, k, v), encoded, strict=True))  # type: ignore[return-value]


class GDNAttention(DualBranchAttention):
    """Frame-wise Gated DeltaNet in both directions of time (SANA-WM sections 1.6, 1.8 and 2.1)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        self.contractive = config.contractive_gdn
        self.conv_k = ShortConv(config.hidden_size, config.conv_kernel_size)
        self.conv_k_cam = ShortConv(config.hidden_size, config.conv_kernel_size)

    def _features(self, q: Tensor, k: Tensor, v: Tensor, at: Positions, camera: bool) -> tuple[Tensor, Tensor, Tensor]:
        k = (self.conv_k_cam if camera else self.conv_k)(k, at)
        q, k, v = super()._features(q, k, v, at, camera)
        return q.relu(), k.relu(), v

    def gates(self, x: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """beta (B, T, S, H) a token, decay (B, T, H) a frame, float32."""
        x = x.unflatten(1, (frames, -1))
        beta = self._linear(self.beta_proj, x).sigmoid()
        step = F.softplus(self._linear(self.gate_proj, x.mean(2)).float() + self.dt_bias.float())
        return beta.float(), (-self.A_log.float().exp() * step).exp()

    @staticmethod
    def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
        # Inside an autocast-free region inputs may be lower precision than weights.
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)

    def mix(self, x: Tensor, main: tuple, camera: tuple | None, at: Positions) -> tuple[Tensor, Tensor | None]:
        frames = at.frames
        beta, decay = self.gates(x, frames)
        by_frame = lambda tensor: tensor.unflatten(1, (frames, -1))  # noqa: E731
        q, k, v = (tensor.float() for tensor in main)
        scale = (q.shape[-1] * (q.shape[1] // frames)) ** -0.5
        k = k * scale
        q_rotated, k_rotated = rotate(q, at.rope), rotate(k, at.rope)
        beta_main = self._bounded(beta, by_frame(k))
        maps = [frame_maps(by_frame(k_rotated), by_frame(v), beta_main, decay)]
        if camera is not None:
            q_cam, k_cam, v_cam = camera
            k_plain = k_cam.float() * scale
            q_cam, k_ray, v_cam = self.to_rays((q_cam, k_plain, v_cam), at)
            discount = by_frame(self._inflation(k_plain, k_ray)).mean(2, keepdim=True).clamp(min=1)
            beta_camera = self._bounded(beta / discount, by_frame(k_ray))
            maps.append(frame_maps(by_frame(k_ray), by_frame(v_cam), beta_camera, decay))
        transitions, increments = (torch.cat(parts) for parts in zip(*maps, strict=True))
        states = at.time.states(transitions, increments).chunk(len(maps))
        # The normaliser is the same recurrence with unrotated keys and one value channel that is 1.
        ones = torch.ones_like(by_frame(k)[..., :1])
        mass = at.time.states(*frame_maps(by_frame(k), ones, beta_main, decay))
        out = read_states(by_frame(q_rotated), states[0]) / (read_states(by_frame(q), mass) + 1e-8)
        if camera is None:
            return out.flatten(1, 2), None
        return out.flatten(1, 2), read_states(by_frame(q_cam), states[1]).flatten(1, 2)

    def _bounded(self, beta: Tensor, k: Tensor) -> Tensor:
        """beta (B, T, S, H) such that I - K^T diag(beta) K of keys (B, T, S, H, D) has no eigenvalue outside [0, 1]."""
        if not self.contractive:
            return beta
        return beta / (beta * k.square().sum(-1)).sum(2, keepdim=True).clamp(min=1)

    @staticmethod
    def _inflation(plain: Tensor, encoded: Tensor) -> Tensor:
        """Squared growth of each key's norm under UCPE, (B, N, H): beta is divided by it where it exceeds 1."""
        before, after = (tensor.norm(dim=-1).clamp(min=1e-6) for tensor in (plain, encoded))
        return (after / before).square()


class SoftmaxAttention(DualBranchAttention):
    """Full attention over all tokens of the clip (section 1.7)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        self.scale_main = attention_scale(config.softmax_scale_main, config.head_dim)
        self.scale_camera = attention_scale(config.softmax_scale_camera, config.head_dim)
        self.compute_dtype = getattr(torch, config.softmax_dtype)

    def mix(self, x: Tensor, main: tuple, camera: tuple | None, at: Positions) -> tuple[Tensor, Tensor | None]:
        q, k, v = main
        # What autocast or the weights made bfloat16 stays so; float32 is rounded as the configuration says.
        dtype = self.compute_dtype if v.dtype == torch.float32 else v.dtype
        out = at.time.attend(rotate(q, at.rope), rotate(k, at.rope), v, self.scale_main, dtype)
        if camera is None:
            return out, None
        return out, at.time.attend(*self.to_rays(camera, at), self.scale_camera, dtype).float()


def attention_scale(kind: SoftmaxScale, head_dim: int) -> float:
    """The scale that a release computes with, see `WorldModelConfig`."""
    if not isinstance(kind, str):
        return kind
    if kind == "head_dim" or head_dim in (32, 64, 128, 256) or head_dim > 256:
        return head_dim**-0.5
    return (128 if head_dim <= 128 else 256) ** -0.5

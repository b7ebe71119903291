"""Dual-branch attention: the main branch and the camera branch, added before one gate and one projection.

Legend: B batch, T latent frames, S tokens a frame, N = T S tokens, C hidden size, H heads, D channels a head.
Parameters bear the names of the public checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.gdn import every_map, gates, read, read_both
from longtake.kernels.launch import wide
from longtake.kernels.modulate import output_gate
from longtake.kernels.short_conv import short_conv
from longtake.kernels.ucpe import encode, to_rays
from longtake.model.config import SoftmaxScale, WorldModelConfig
from longtake.model.dit.joint import Joint
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

    def of_block(self, number: int) -> Positions:
        """With the time axis of one block."""
        time = self.time.of_block(number)
        return self if time is self.time else replace(self, time=time)


class ShortConv(nn.Module):
    """Holds the weight of a symmetric temporal convolution, the identity at first."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size))
        nn.init.ones_(self.weight[:, :, -1])

    def forward(self, x: Tensor, at: Positions, part: str) -> Tensor:
        x, reach = x.unflatten(1, (at.frames, -1)), self.weight.shape[-1] - 1
        return at.time.around(x, reach, self._over_time, part=part).flatten(1, 2)

    def _over_time(self, x: Tensor, first: int, before: Tensor | None = None) -> Tensor:
        return short_conv(x, self.weight, before)[:, first:]


class DualBranchAttention(nn.Module):
    """What GDN and softmax attention share: projections, norms, output gate. x (B, N, C) is the modulated input."""

    # Whose place `joint` takes, where there is one.
    joined = "qkv", "q_proj_cam", "k_proj_cam", "v_proj_cam", "output_gate"

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
        self.joint: nn.Module | None = None
        # The GDN's gates; softmax blocks of the public checkpoints carry them, unused.
        self.beta_proj, self.gate_proj = nn.Linear(size, heads), nn.Linear(size, heads)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.register_buffer("recall_gate", torch.zeros(1))
        self.conv_k: ShortConv | None = None  # GDN's, over time
        self.conv_k_cam: ShortConv | None = None
        self._initialise()

    def _initialise(self) -> None:
        self.A_log.data.uniform_(1e-3, 16).log_()
        step = (torch.rand(self.heads) * math.log(100) + math.log(1e-3)).exp()  # log-uniform in [1e-3, 0.1]
        self.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        nn.init.zeros_(self.out_proj_cam.weight)
        nn.init.zeros_(self.out_proj_cam.bias)
        nn.init.zeros_(self.output_gate.weight)
        nn.init.constant_(self.output_gate.bias, 1.278464542761074)  # SiLU of this is 1
        for own, main in zip(
            (self.q_proj_cam, self.k_proj_cam, self.v_proj_cam), self.qkv.weight.chunk(3), strict=True
        ):
            own.weight.data.copy_(main.data)
            nn.init.zeros_(own.bias)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        main, camera, gate, others = self._projected(x, at.ray_from_world is not None)
        main = self._heads(main, at, "conv_k")
        camera = None if camera is None else self._heads(camera, at, "conv_k_cam")
        with torch.autocast(x.device.type, enabled=False):
            mixed, mixed_camera = self.mix(x, main, camera, at, others)
        from_camera = None
        if mixed_camera is not None:
            mixed_camera, *_ = encode(mixed_camera, at.camera_rope, matrix=at.ray_from_world, inverse_rope=True)
            from_camera = at.seen(self.out_proj_cam(mixed_camera.to(x.dtype).flatten(2)))
        return self.proj(output_gate(mixed.flatten(2), gate, from_camera))

    def _projected(
        self, x: Tensor, camera: bool
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Tensor, Tensor | None]:
        """Queries, keys and values of the main branch, and of the camera's, and the output gate, (B, N, C) each; and
        what else was projected with them, of layers that a subclass puts beside them.
        """
        if self.joint is not None and (camera or not isinstance(self.joint, Joint)):
            whole, size = self.joint(x), x.shape[-1]
            *parts, gate = whole[..., : 7 * size].chunk(7, dim=-1)
            others = whole[..., 7 * size :] if isinstance(self.joint, Joint) else None
            return tuple(parts[:3]), tuple(parts[3:]) if camera else None, gate, others
        of_camera = (self.q_proj_cam(x), self.k_proj_cam(x), self.v_proj_cam(x)) if camera else None
        return self.qkv(x).chunk(3, dim=-1), of_camera, self.output_gate(x), None

    @torch.no_grad()
    def lay_out(self, *beside: nn.Linear) -> None:
        """Put weights that will not be trained where they are read fastest."""
        if self.joint is None:
            self.joint = Joint([*(getattr(self, each) for each in self.joined), *beside])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.joint, Joint):
            self.joint = None  # tensors may be replaced
        super()._load_from_state_dict(*args, **kwargs)

    def mix(
        self, x: Tensor, main: tuple, camera: tuple | None, at: Positions, others: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of both branches: projected (q, k, v) of (B, N, H, D) to (B, N, H, D) each; the camera's still in
        ray coordinates. others: as of `_projected`.
        """
        raise NotImplementedError

    def _heads(self, branch: tuple, at: Positions, conv: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = branch
        if (over_time := getattr(self, conv)) is not None:
            k = over_time(k, at, conv)
        return tuple(tensor.unflatten(-1, (self.heads, -1)) for tensor in (q, k, v))  # type: ignore[return-value]

    def to_rays(
        self, camera: tuple, at: Positions, relu: bool = False, scale: float = 1.0, into: tuple = (None, None)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values in the coordinates of their rays, (B, N, H, D), and the keys' inflation (B, N, H):
        squared growth of their norms under UCPE. into: memory for keys and values.
        """
        assert at.ray_from_world is not None and at.world_from_ray is not None
        weights, matrices = (self.q_norm_cam.weight, self.k_norm_cam.weight), (at.ray_from_world.mT, at.world_from_ray)
        return to_rays(camera, weights, matrices, at.camera_rope, relu, scale, self.ucpe_downscale, into)


class GDNAttention(DualBranchAttention):
    """Frame-wise Gated DeltaNet in both directions of time (SANA-WM sections 1.6, 1.8 and 2.1)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        self.contractive, self.key_scale = config.contractive_gdn, config.key_scale
        self.conv_k = ShortConv(config.hidden_size, config.conv_kernel_size)
        self.conv_k_cam = ShortConv(config.hidden_size, config.conv_kernel_size)
        self.joint_gates: Joint | None = None  # where they are not in `joint`

    @torch.no_grad()
    def lay_out(self, *beside: nn.Linear) -> None:
        gates = self.beta_proj, self.gate_proj
        self.joint_gates = None if self.joint is None else Joint(gates)
        super().lay_out(*gates)
        for conv in (self.conv_k, self.conv_k_cam):
            assert conv is not None
            conv.weight.data = conv.weight.data[:, 0].T.contiguous().T[:, None]

    def gates(
        self, x: Tensor, frames: int, inflation: Tensor | None = None, projected: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """beta (B, T, S, H) a token, decay (B, T, H) a frame, and of keys with an inflation (B, N, H) the camera's
        beta; float32.
        """
        # One product for both: the mean over a frame's tokens may as well be taken of what is projected.
        if projected is None and self.joint_gates is not None:
            projected = self.joint_gates(x)
        if projected is not None:
            projected = projected[..., : 2 * self.heads]
        else:
            weight = torch.cat([self.beta_proj.weight, self.gate_proj.weight])
            # Inside an autocast-free region inputs may be lower precision than weights.
            projected = F.linear(x.to(weight.dtype), weight, torch.cat([self.beta_proj.bias, self.gate_proj.bias]))
        return gates(projected, frames, self.dt_bias, self.A_log, inflation)

    def mix(
        self, x: Tensor, main: tuple, camera: tuple | None, at: Positions, others: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = main
        by_frame = lambda tensor: tensor.unflatten(1, (at.frames, -1))  # noqa: E731
        scale = {"tokens": q.shape[-1] * (q.shape[1] // at.frames), "channels": q.shape[-1], "none": 1}[self.key_scale]
        scale = scale**-0.5
        q_rotated, q, _ = encode(q, at.rope, self.q_norm.weight, relu=True, plain=True)
        k_rotated, k, _ = encode(k, at.rope, self.k_norm.weight, relu=True, scale=scale, plain=True)
        assert q is not None and k is not None
        q_cam = inflation = None
        if camera is not None:
            q_cam, k_cam, v_cam, inflation = self.to_rays(camera, at, relu=True, scale=scale)
        beta, decay, beta_camera = self.gates(x, at.frames, inflation, others)
        beta_main = self._bounded(beta, by_frame(k))
        branches = [(by_frame(k_rotated), by_frame(v), beta_main)]
        if beta_camera is not None:
            beta_camera = self._bounded(beta_camera, by_frame(k_cam))
            branches.append((by_frame(k_cam), by_frame(v_cam), beta_camera))
        part = "main" if q_cam is None else "main camera"
        maps, of_mass = every_map(branches, by_frame(k), decay)
        states, mass = at.time.every_state((*maps, part), (*of_mass, "mass"))
        states = states.chunk(len(branches))
        given = by_frame(q_rotated), states[0], by_frame(q), mass.squeeze(-2)
        if q_cam is None:
            return read(*given).flatten(1, 2), None
        out, of_camera = read_both(given, by_frame(q_cam), states[1])
        return out.flatten(1, 2), of_camera.flatten(1, 2)

    def _bounded(self, beta: Tensor, k: Tensor) -> Tensor:
        """beta (B, T, S, H) such that I - K^T diag(beta) K of keys (B, T, S, H, D) has no eigenvalue outside [0, 1]."""
        if not self.contractive:
            return beta
        return beta / (beta * k.square().sum(-1)).sum(2, keepdim=True).clamp(min=1)


class SoftmaxAttention(DualBranchAttention):
    """Full attention over all tokens of the clip (section 1.7)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        self.scale_main = attention_scale(config.softmax_scale_main, config.head_dim)
        self.scale_camera = attention_scale(config.softmax_scale_camera, config.head_dim)
        self.compute_dtype = getattr(torch, config.softmax_dtype)

    def mix(
        self, x: Tensor, main: tuple, camera: tuple | None, at: Positions, others: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = main
        # What autocast or the weights made bfloat16 stays so; float32 is rounded as the configuration says.
        dtype = v.dtype if v.dtype != torch.float32 and self.compute_dtype.itemsize > 1 else self.compute_dtype
        q, *_ = encode(q, at.rope, self.q_norm.weight)
        k, *_ = encode(k, at.rope, self.k_norm.weight, into=at.time.rooms("keys", k.shape[1])[0])
        out = at.time.attend(q, k, v, self.scale_main, dtype, part="keys")
        if camera is None:
            return out, None
        q, k, v, _ = self.to_rays(camera, at, into=at.time.rooms("camera keys", x.shape[1]))
        of_camera = at.time.attend(q, k, v, self.scale_camera, dtype, part="camera keys")
        return out, of_camera if of_camera.dtype == x.dtype else wide(of_camera)


def attention_scale(kind: SoftmaxScale, head_dim: int) -> float:
    """The scale that a release computes with, see `WorldModelConfig`."""
    if not isinstance(kind, str):
        return kind
    if kind == "head_dim" or head_dim in (32, 64, 128, 256) or head_dim > 256:
        return head_dim**-0.5
    return (128 if head_dim <= 128 else 256) ** -0.5

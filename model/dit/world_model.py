"""The stage-1 network, in the words of its paper: patches, time, text and camera in; a velocity for every latent frame
out.

Legend: B batch, T latent frames, N = T x height x width tokens in that order, C hidden size. Modules bear the names of
the public checkpoints (SANA-WM section 1.13), so a state dict of either release maps by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.attention import attend_masked
from longtake.kernels.launch import wide
from longtake.kernels.modulate import add_and_modulate, gated, modulate
from longtake.model.camera import CameraFeatures, ray_matrices
from longtake.model.config import WorldModelConfig
from longtake.model.dit.attention import GDNAttention, Positions, SoftmaxAttention
from longtake.model.dit.checkpointing import checkpointed
from longtake.model.dit.feed_forward import T_CONV, GLUMBConvTemp
from longtake.model.dit.positions import RotaryTable
from longtake.model.dit.time_axis import WHOLE_CLIP, Padded, TimeAxis
from longtake.model.state import Traces

OfRays = Callable[[Tensor], list[Tensor]]


class PatchEmbed(nn.Module):
    """One token a latent position: (B, channels, T, h, w) to (B, N, C)."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A 1 x 1 x 1 convolution is a matrix product, and many times faster as one.
        return F.linear(x.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoids of integer timesteps in [0, 1000] through two layers: (B, T) to (B, T, C)."""

    def __init__(self, size: int, width: int = 256):
        super().__init__()
        self.num_frequencies = width // 2
        self.mlp = nn.Sequential(nn.Linear(width, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, timestep: Tensor) -> Tensor:
        # The public models see truncated timesteps: 888.9 is 888.
        index = torch.arange(self.num_frequencies, device=timestep.device)
        frequency = torch.exp(-math.log(10000) / self.num_frequencies * index)
        angle = timestep.long().float()[..., None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class CaptionEmbedder(nn.Module):
    """Text features to the hidden size. `y_embedding` is the learned caption of no text, used in training alone."""

    def __init__(self, length: int, channels: int, size: int):
        super().__init__()
        self.y_proj = nn.ModuleDict({"fc1": nn.Linear(channels, size), "fc2": nn.Linear(size, size)})
        self.y_embedding = nn.Parameter(torch.randn(length, channels) / channels**0.5)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj["fc2"](F.gelu(self.y_proj["fc1"](text), approximate="tanh"))


class RMSNorm(nn.RMSNorm):
    """In the dtype of its input: under autocast, torch has no fused one for weights of another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CrossAttention(nn.Module):
    """Every token attends to the text: its features (B, L, C), or their keys and values. mask (B, L): what is added
    to its scores.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = (
            nn.Linear(size, size),
            nn.Linear(size, 2 * size),
            nn.Linear(size, size),
        )
        self.q_norm, self.k_norm = RMSNorm(size, 1e-6), RMSNorm(size, 1e-6)

    def keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H, D) each."""
        k, v = self.kv_linear(text).chunk(2, dim=-1)
        return self._heads(self.k_norm(k).to(v.dtype)), self._heads(v)

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        k, v = text if isinstance(text, tuple) else self.keys_and_values(text)
        q = self._heads(self.q_norm(self.q_linear(x)).to(v.dtype))
        out = attend_masked(q, k, v, q.shape[-1] ** -0.5, mask.to(q.dtype))
        return self.proj(out.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """Attention, Pluecker embedding, text, feed-forward; modulated once a latent frame (section 1.2)."""

    def __init__(self, config: WorldModelConfig, softmax: bool):
        super().__init__()
        size = config.hidden_size
        self.attn = (SoftmaxAttention if softmax else GDNAttention)(config)
        self.cross_attn = CrossAttention(size, config.num_heads)
        self.mlp = GLUMBConvTemp(size, int(size * config.mlp_ratio), config.temporal_kernel_size)
        self.plucker_proj = nn.Linear(size, size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, size) / size**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        mask: Tensor,
        time: Tensor | tuple[Tensor, ...],
        at: Positions,
        plucker: Tensor | None,
        grid: tuple,
        rays: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, C); text (B, L, C) or its keys and values; time (B, T, 6, C), or what this block makes of it, six of
        (B, T, 1, C); rays: what became of plucker.
        """
        modulation = time if isinstance(time, tuple) else (self.scale_shift_table + time).chunk(6, dim=2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        if plucker is not None:
            rays = at.seen(self.plucker_proj(plucker))
        x = gated(x, gate_a, self.attn(modulate(x, shift_a, scale_a), at), plus=rays)
        x, modulated = add_and_modulate(x, self.cross_attn(x, text, mask), shift_m, scale_m)
        return gated(x, gate_m, *self.mlp(modulated, grid, at.time))


class FinalLayer(nn.Module):
    """Modulated by the timestep embedding itself, not by `t_block`."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(size, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, size) / size**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, :, None]).chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))


@dataclass
class Context:
    """What a denoising step reads beside the latents: the same for all steps of a sample. text: features (B, L, C), or
    for each block their keys and values; plucker: embedded (B, N, C); rays: in its place, what each block makes of it.
    """

    grid: tuple[int, int, int]
    text: Tensor | list[tuple[Tensor, Tensor]]
    mask: Tensor
    at: Positions
    plucker: Tensor | None = None
    rays: list[Tensor] | None = None


class WorldModel(nn.Module):
    """SANA-WM's diffusion transformer; random weights in float32.

    A clean latent frame (the image) has timestep 0. Without a camera, or where `config.camera_branches` says so, the
    camera branch and the Pluecker embedding are left out. checkpoint_blocks: in training, keep nothing of a block but
    its input and the result of its softmax attention, and compute the rest once more in the backward pass.
    """

    checkpoint_blocks = False
    _laid_out = False

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.x_embedder = PatchEmbed(config.latent_channels, size)
        self.t_embedder = TimestepEmbedder(size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))
        self.y_embedder = CaptionEmbedder(config.text.length, config.text_dim, size)
        self.attention_y_norm = RMSNorm(size, 1e-5)
        self.plucker_embedder = PatchEmbed(config.plucker_channels, size)
        self.raymap_embedder = PatchEmbed(3, size)  # of the public checkpoints; Pluecker maps took its place
        every = config.softmax_every
        self.blocks = nn.ModuleList(
            Block(config, softmax=every > 0 and (i + 1) % every == 0) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(size, config.latent_channels)
        self.rotary = RotaryTable(config.head_dim, config.max_latent_frames)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
                nn.init.zeros_(module.proj.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[union-attr]
            nn.init.zeros_(layer.bias)  # type: ignore[union-attr]
        nn.init.constant_(self.attention_y_norm.weight, 0.01)
        for parameter in self.plucker_embedder.parameters():
            nn.init.zeros_(parameter)

    def start_from_gdn(self, gdn: WorldModel) -> None:
        """Take the weights of a network with GDN in every block.

        A softmax block begins with the projections, norms and gates of the GDN block it replaces, which change its
        output least: both average the values by how well keys fit the query, only the GDN's weights fade with time.
        """
        theirs = gdn.state_dict()
        self.load_state_dict({name: theirs[name] for name in self.state_dict()})

    def lay_out(self) -> WorldModel:
        """Weights that will not be trained where their kernels read them fastest, without gradients; the network."""
        blocks: Any = self.blocks
        for block in blocks:
            block.mlp.lay_out()
            block.attn.lay_out()
        self._laid_out = True
        return self

    @property
    def null_caption(self) -> Tensor:
        """Features (L, D_text) that stand for no caption."""
        return self.y_embedder.y_embedding

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None = None,
        time_axis: TimeAxis = WHOLE_CLIP,
        camera_seen: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """Velocity noise - x0, (B, C, T, h, w) like `latents`.

        timestep (B, T) in [0, 1000]; text (B, L, D_text); text_mask (B, L), nonzero for real tokens. Where the time
        axis holds a stretch of the clip, latents, timestep and camera are that stretch's. camera_seen (B,): false for
        clips that are to be as if they had no camera. frames (B,), int64: how many latent frames of each whole clip are
        real; the others are padding at its end, which changes nothing of the real ones and whose velocity means
        nothing. On a GPU the host waits for them. ValueError where they do not fit.
        """
        context = self.context(latents.shape[2:], text, text_mask, camera, time_axis, camera_seen, frames=frames)
        return self.velocity(latents, timestep, context)

    def context(
        self,
        grid: Sequence[int],
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None = None,
        time_axis: TimeAxis = WHOLE_CLIP,
        camera_seen: Tensor | None = None,
        of_sample: bool = False,
        frames: Tensor | None = None,
    ) -> Context:
        """What `velocity` reads of text and camera, for latents of a (T, h, w) grid; arguments as in `forward`.

        of_sample: for many steps, so keys and values of the text are computed here, once for all of them.
        """
        if frames is not None:
            time_axis = _padded(time_axis, frames.cpu(), tuple(grid), text)
        return self.placed(self.read_text(text, of_sample), text_mask, grid, camera, time_axis, camera_seen)

    def read_text(self, text: Tensor, of_sample: bool = False) -> Tensor | list[tuple[Tensor, Tensor]]:
        """What a `Context` holds of text features (B, L, D_text)."""
        y = self.attention_y_norm(self.y_embedder(text.to(self.x_embedder.proj.weight.dtype)))
        blocks: Any = self.blocks
        return [block.cross_attn.keys_and_values(y) for block in blocks] if of_sample else y

    @torch.no_grad()
    def of_rays(self) -> OfRays:
        """What makes of Pluecker maps (B, 48, T, h, w) what each block adds to its tokens, (B, N, C) each, for many
        samples. Of weights that are laid out the embedding and a block's projection are one product, made here.
        """
        blocks: Any = self.blocks
        embedder, projections = self.plucker_embedder, [block.plucker_proj for block in blocks]

        def by_both(plucker: Tensor) -> list[Tensor]:
            embedded = embedder(plucker)
            return [each(embedded) for each in projections]

        if not self._laid_out or any(type(each) is not nn.Linear for each in projections):
            return by_both
        assert embedder.proj.bias is not None
        dtype, layers = embedder.proj.weight.dtype, []
        first, bias = wide(embedder.proj.weight.flatten(1)), wide(embedder.proj.bias)
        for each in projections:
            weight = wide(each.weight)
            joined = weight @ first, F.linear(bias, weight, wide(each.bias))
            layers.append([x.to(dtype) for x in joined])

        def by_one(plucker: Tensor) -> list[Tensor]:
            tokens = plucker.flatten(2).transpose(1, 2).contiguous()
            return [F.linear(tokens, *layer) for layer in layers]

        return by_one

    def of_past(self, seen: Traces) -> Traces:
        """What a time axis has seen, with what weights that are laid out make of it: once for many passes."""
        blocks: Any = self.blocks
        return {
            (number, part): (*trace, blocks[number].mlp.of_past(*trace)) if self._laid_out and part == T_CONV else trace
            for (number, part), trace in seen.items()
        }

    def placed(
        self,
        text: Tensor | list[tuple[Tensor, Tensor]],
        text_mask: Tensor,
        grid: Sequence[int],
        camera: CameraFeatures | None = None,
        time_axis: TimeAxis = WHOLE_CLIP,
        camera_seen: Tensor | None = None,
        of_rays: OfRays | None = None,
    ) -> Context:
        """A context of text that was read before, for these frames; other arguments as in `forward`.

        of_rays: of the network, for many steps of few frames: what each block makes of the rays is computed here, once.
        """
        rays = camera if self.config.reads_rays else None
        at, dtype = self._positions(tuple(grid), rays, text_mask.device, time_axis), self.x_embedder.proj.weight.dtype
        if camera_seen is not None:
            at.camera_seen = camera_seen[:, None, None]
        mask = torch.zeros_like(text_mask, dtype=dtype)
        mask.masked_fill_(text_mask == 0, -math.inf)
        context = Context(tuple(grid), text, mask, at)  # type: ignore[arg-type]
        if camera is not None and self.config.reads_plucker:
            plucker = camera.plucker.to(dtype)
            if of_rays is None:
                context.plucker = self.plucker_embedder(plucker)
            else:
                context.rays = [at.seen(each) for each in of_rays(plucker)]
        return context

    def velocity(self, latents: Tensor, timestep: Tensor, context: Context) -> Tensor:
        """As `forward`, of a context prepared before."""
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        time = self.t_embedder(timestep)
        modulation = self.t_block(time).unflatten(-1, (6, -1))
        modulations: Any = [modulation] * len(self.blocks)
        if self._laid_out and not torch.is_grad_enabled():  # one launch for all blocks
            tables: Any = torch.stack([block.scale_shift_table for block in self.blocks])  # type: ignore[misc]
            modulations = [each.chunk(6, dim=2) for each in tables[:, None, None] + modulation]
        for number, block in enumerate(self.blocks):
            text = context.text[number] if isinstance(context.text, list) else context.text
            rays = context.rays[number] if context.rays else None
            at = context.at.of_block(number)
            others = text, context.mask, modulations[number], at, context.plucker, context.grid, rays
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpointed(block, x, *others)
            else:
                x = block(x, *others)
        return self.final_layer(x, time).transpose(1, 2).unflatten(2, context.grid)

    def _positions(
        self, grid: tuple[int, ...], camera: CameraFeatures | None, device: torch.device, time: TimeAxis
    ) -> Positions:
        frames, (first, whole) = grid[0], time.place(grid[0])
        rope, camera_rope = self.rotary(grid, device, first, whole)
        if camera is None:
            return Positions(frames, rope, camera_rope, time=time)
        with torch.autocast(device.type, enabled=False):
            ray_from_world, world_from_ray = ray_matrices(camera.conditions.float(), grid[1], grid[2])
        rays = ray_from_world.flatten(1, 3), world_from_ray.flatten(1, 3)
        return Positions(frames, rope, camera_rope, *rays, time=time)


def _padded(axis: TimeAxis, frames: Tensor, grid: tuple[int, ...], text: Tensor) -> TimeAxis:
    """The axis of clips of which `frames` are real; the same one where all are."""
    held, height, width = grid
    _, whole = axis.place(held)
    if frames.shape != (len(text),) or not 1 <= int(frames.min()) <= int(frames.max()) <= whole:
        raise ValueError(f"frames must be one of 1 to {whole} for each of {len(text)} clips, not {frames.tolist()}")
    return axis if bool((frames == whole).all()) else Padded(axis, frames, (held, height, width), text.device)

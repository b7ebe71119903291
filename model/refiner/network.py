"""LTX-2's video transformer under its own names, without the audio stream beside it (SANA-WM section 3.4).

Legend: B batch, T latent frames, S tokens a frame, N = T S tokens, L tokens of text, C width, H heads, D channels a
head. What lies between the matrix products is one pass over memory each, by torch.compile on GPUs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.attention import attend
from longtake.kernels.float8 import rounded
from longtake.kernels.norm_rope import Rotation, norm_rope, turned
from longtake.model.dit.checkpointing import checkpointed
from longtake.model.float8 import Float8Linear
from longtake.model.sent import sent

KeysValues = tuple[Tensor, Tensor]  # (B, N, H, D) each

_EPS = 1e-6
_BASE_SECONDS, _BASE_PIXELS, _THETA = 20, 2048, 10_000.0


@dataclass
class Reading:
    """What the tokens of a pass read beside themselves.

    text: features (B, L, D_text); mask: bool (B, 1, 1, L), None where every token of the text is real. text_keys: where
    the first pass leaves, for later ones, keys and values of the text by the number of a block; None to compute them
    each time. rotation: of the pass' own tokens. before: of each block, keys and values of earlier tokens, followed by
    room for the pass' own, which it fills; None where there are no others. plain: takes of each block the keys before
    their rotation, and the values. attention: what takes the place of each token's to all; of queries, keys and values
    before their rotation, and of that.
    """

    text: Tensor
    mask: Tensor | None
    rotation: Rotation
    text_keys: dict[int, KeysValues] | None = None
    before: list[KeysValues] | None = None
    plain: list[KeysValues] | None = None
    attention: Callable[[Tensor, Tensor, Tensor, Rotation], Tensor] | None = None


class Attention(nn.Module):
    """Projections and norms of one attention; queries, keys and values are normalised over all heads."""

    joined = "to_q", "to_k", "to_v"  # whose place `joint` takes, where there is one

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = nn.RMSNorm(size, _EPS), nn.RMSNorm(size, _EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, size) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.joint: nn.Module | None = None

    def queries(self, x: Tensor) -> Tensor:
        return self._by_heads(self.norm_q(self.to_q(x)))

    def keys_and_values(self, x: Tensor) -> KeysValues:
        return self._by_heads(self.norm_k(self.to_k(x))), self._by_heads(self.to_v(x))

    def in_place(self, x: Tensor, rotation: Rotation, room: KeysValues | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries turned by their positions, and keys turned, with values: after those that are there, where there is
        room, which keeps them.
        """
        q, k, v = self._projected(x)
        weights = self.norm_q.weight, self.norm_k.weight
        if room is None:
            return *norm_rope(q, k, *weights, rotation), v
        own_k, own_v = (each[:, -k.shape[1] :] for each in room)
        q, _ = norm_rope(q, k, *weights, rotation, (own_k, own_v), v)
        return q, *room

    def before_place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before they are turned by their positions."""
        q, k, v = self._projected(x)
        return self._by_heads(self.norm_q(q.flatten(2))), self._by_heads(self.norm_k(k.flatten(2))), v

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        each = (self.to_q(x), self.to_k(x), self.to_v(x)) if self.joint is None else self.joint(x).chunk(3, dim=-1)
        return tuple(self._by_heads(part) for part in each)

    def _by_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))

    def output(self, x: Tensor) -> Tensor:
        """Of what was attended to, (B, N, H, D)."""
        return self.to_out[0](x.flatten(2))


class Block(nn.Module):
    """Attention to the window, to the text, feed-forward; modulated once a latent frame."""

    def __init__(self, size: int, heads: int):
        from diffusers.models.attention import FeedForward  # seconds of imports, which only a refiner needs

        super().__init__()
        self.attn1, self.attn2 = Attention(size, heads), Attention(size, heads)
        self.ff = FeedForward(size, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, size) / size**0.5)

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None, reading: Reading, number: int) -> Tensor:
        """x (B, N, C); time (B, T, 6, C); text (B, L, C), or None where its keys are known; number: the block's."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.scale_shift_table + time).unbind(2)
        x = _gated(x, gate_a, self._self_attention(_modulated(x, shift_a, scale_a), reading, number))
        x = x + self._cross_attention(_normed(x), text, reading, number)
        return _gated(x, gate_m, self._feed_forward(_modulated(x, shift_m, scale_m)))

    def _self_attention(self, x: Tensor, reading: Reading, number: int) -> Tensor:
        if reading.plain is None and reading.attention is None and not torch.is_grad_enabled():
            room = None if reading.before is None else reading.before[number]
            q, k, v = self.attn1.in_place(x, reading.rotation, room)
        else:
            q, k, v = self.attn1.before_place(x)
            if reading.plain is not None:
                reading.plain.append((k, v.contiguous()))
            if reading.attention is not None:
                return self.attn1.output(reading.attention(q, k, v, reading.rotation))
            q, k = rotated(q, reading.rotation), rotated(k, reading.rotation)
        return self.attn1.output(attend(q, k, v, q.shape[-1] ** -0.5))

    def _feed_forward(self, x: Tensor) -> Tensor:
        layers: Any = self.ff.net
        up, down = layers[0].proj, layers[2]
        return down(rounded(up(x), gelu=True)) if isinstance(down, Float8Linear) else self.ff(x)

    def _cross_attention(self, x: Tensor, text: Tensor | None, reading: Reading, number: int) -> Tensor:
        if text is None:
            assert reading.text_keys is not None
            k, v = reading.text_keys[number]
        else:
            k, v = self.attn2.keys_and_values(text)
            if reading.text_keys is not None:
                reading.text_keys[number] = k, v
        q = self.attn2.queries(x)
        if reading.mask is None:
            return self.attn2.output(attend(q, k, v, q.shape[-1] ** -0.5))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.attn2.output(F.scaled_dot_product_attention(q, k, v, attn_mask=reading.mask).transpose(1, 2))


class VideoTransformer(nn.Module):
    """Tokens (B, N, channels) and their frames' timesteps in, velocities out; random weights.

    checkpoint_blocks: in training, keep nothing of a block but its input, as a world model does.
    """

    checkpoint_blocks = False

    def __init__(self, channels: int, heads: int, head_dim: int, num_layers: int, text_dim: int):
        from diffusers.models.embeddings import PixArtAlphaTextProjection
        from diffusers.models.normalization import AdaLayerNormSingle

        super().__init__()
        size = heads * head_dim
        self.heads = heads
        self.proj_in = nn.Linear(channels, size)
        self.caption_projection = PixArtAlphaTextProjection(text_dim, size)
        self.time_embed = AdaLayerNormSingle(size, use_additional_conditions=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, size) / size**0.5)
        self.transformer_blocks = nn.ModuleList(Block(size, heads) for _ in range(num_layers))
        self.proj_out = nn.Linear(size, channels)

    def forward(self, tokens: Tensor, timestep: Tensor, reading: Reading) -> Tensor:
        """tokens (B, N, channels); timestep (B, T) in [0, 1000]."""
        x = self.proj_in(tokens.to(self.proj_in.weight.dtype))
        no_size: Any = {"resolution": None, "aspect_ratio": None}
        time, embedded = self.time_embed(timestep.flatten(), no_size, hidden_dtype=x.dtype)
        time = time.view(*timestep.shape, 6, -1)
        text = None if reading.text_keys else self.caption_projection(reading.text.to(x.dtype))
        for number, block in enumerate(self.transformer_blocks):
            given = x, time, text, reading, number
            x = checkpointed(block, *given) if self.checkpoint_blocks and torch.is_grad_enabled() else block(*given)
        shift, scale = (self.scale_shift_table + embedded.view(*timestep.shape, 1, -1)).unbind(2)
        return self.proj_out(_modulated_by_layer_norm(x, shift, scale))

    def rotation(
        self, frames: Sequence[int], height: int, width: int, fps: float, stride: Sequence[int], device: torch.device
    ) -> Rotation:
        """Of the tokens of latent frames at these places in their video: a token is where the middle of what it stands
        for is, in seconds and pixels. The first frame stands for one raw frame, others for `stride[0]`.
        """
        half = self.proj_in.out_features // 2
        begin = sent(torch.tensor(frames, dtype=torch.float32), device)
        seconds = [((begin + end) * stride[0] + 1 - stride[0]).clamp(min=0) / fps for end in (0, 1)]
        axes = [(seconds[0] + seconds[1]) / 2 / _BASE_SECONDS]
        for count, pixels in zip((height, width), stride[1:], strict=True):
            axes.append((torch.arange(count, dtype=torch.float32, device=device) + 0.5) * pixels / _BASE_PIXELS)
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        steps = torch.linspace(0, 1, half // 3, dtype=torch.float64, device=device)
        frequencies = (_THETA**steps * math.pi / 2).float()
        angles = ((2 * places - 1)[:, None] * frequencies[:, None]).flatten(1)
        # What three axes do not divide is not turned.
        angles = F.pad(angles, (half - angles.shape[1], 0)).unflatten(1, (self.heads, -1))
        return angles.cos(), angles.sin()


def _on_gpus_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.cache
    def compiled() -> Any:  # not before there is a use for it: that imports the compiler
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def choose(x: Tensor, *others: Any) -> Tensor:
        return (compiled() if x.is_cuda and not torch.compiler.is_compiling() else function)(x, *others)

    return choose


@_on_gpus_compiled
def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


@_on_gpus_compiled
def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMS norm without weights, then a scale and a shift a frame, (B, T, C) each."""
    return _scaled(F.rms_norm(x.float(), x.shape[-1:], eps=_EPS), shift, scale).to(x.dtype)


@_on_gpus_compiled
def _modulated_by_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _scaled(F.layer_norm(x.float(), x.shape[-1:], eps=_EPS), shift, scale).to(x.dtype)


def _scaled(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x = x.unflatten(1, (shift.shape[1], -1))
    return (x * (1 + scale[:, :, None].float()) + shift[:, :, None].float()).flatten(1, 2)


@_on_gpus_compiled
def _gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, a gate a frame, (B, T, C)."""
    moved = y.float().unflatten(1, (gate.shape[1], -1)) * gate[:, :, None].float()
    return (x.float() + moved.flatten(1, 2)).to(x.dtype)


@_on_gpus_compiled
def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, N, H, D), the two halves of each head turned as pairs."""
    return turned(x.float(), rotation).to(x.dtype)

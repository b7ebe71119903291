"""The video autoencoder: diffusers' LTX-2 VAE, its normalised latents, and exact decoding in constant memory.

Latents are the posterior mode, normalised per channel: (z - mean) * scaling / std (SANA-WM section 1.10). Pixels are
uint8 (B, F, H, W, 3); F = 8 k + 1 frames give k + 1 latent frames, the first of which holds one frame alone.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.kernels.conv_input import conv_input
from longtake.model.config import WorldModelConfig

if TYPE_CHECKING:  # seconds of imports, which only a process with an autoencoder needs
    from diffusers import AutoencoderKLLTX2Video
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d, LTX2VideoUpsampler3d


def build_vae(config: WorldModelConfig) -> AutoencoderKLLTX2Video:
    """The preset's autoencoder with random weights, float32."""
    from diffusers import AutoencoderKLLTX2Video

    frames, rows, _ = config.vae_stride
    vae = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        temporal_compression_ratio=frames,
        spatial_compression_ratio=rows,
        **config.vae,
    )
    _initialise(vae)
    return vae


@torch.no_grad()
def _initialise(vae: AutoencoderKLLTX2Video) -> None:
    """Start as a nearly linear network whose latents are nearly free of noise."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoResnetBlock3d

    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            # torch's default shrinks the signal of a deep stack without affine norms: unit gain instead.
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, LTX2VideoResnetBlock3d):
            module.conv2.conv.weight.mul_(0.1)
    for coder in (vae.encoder, vae.decoder):
        # The norms divide by a position's magnitude; a bias keeps brightness visible after them.
        torch.nn.init.normal_(coder.get_parameter("conv_in.conv.bias"))
    vae.decoder.get_parameter("conv_out.conv.weight").mul_(0.2)
    # The encoder's last channel is the log variance of all latents.
    vae.encoder.get_parameter("conv_out.conv.weight")[-1].mul_(0.1)
    vae.encoder.get_parameter("conv_out.conv.bias")[-1] = -6


@torch.no_grad()
def make_causal(vae: AutoencoderKLLTX2Video) -> None:
    """Weights of a decoder that sees later frames, as a start for one that does not: what later frames were multiplied
    by, a frame itself is.
    """
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d

    for module in vae.decoder.modules():
        if isinstance(module, LTX2VideoCausalConv3d):
            weight, reach = module.conv.weight, (module.kernel_size[0] - 1) // 2
            seen = weight[:, :, : reach + 1].clone()
            seen[:, :, reach] += weight[:, :, reach + 1 :].sum(2)
            weight.zero_()
            weight[:, :, reach:] = seen


def to_pixels(video: Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]."""
    return video.movedim(-1, 1).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """float (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3)."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def normalise(vae: AutoencoderKLLTX2Video, latents: Tensor) -> Tensor:
    """Raw latents (B, C, T, h, w) to unit scale, float32."""
    mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
    return (latents.float() - mean) * vae.config["scaling_factor"] / std


def denormalise(vae: AutoencoderKLLTX2Video, latents: Tensor) -> Tensor:
    """Inverse of `normalise`."""
    mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
    return latents.float() * std / vae.config["scaling_factor"] + mean


@torch.no_grad()
def encode_frames(vae: AutoencoderKLLTX2Video, frames: Tensor) -> Tensor:
    """Normalised latents (B, C, T, h, w), float32, of uint8 frames (B, F, H, W, 3). ValueError unless F = 8 k + 1."""
    stride = vae.temporal_compression_ratio
    if (frames.shape[1] - 1) % stride:
        raise ValueError(
            f"{frames.shape[1]} frames cannot be encoded: give {stride} k + 1 frames (1, {stride + 1}, ...)"
        )
    posterior = vae.encode(to_pixels(frames).to(vae.dtype), return_dict=False)[0]
    return normalise(vae, posterior.mode())


@torch.no_grad()
def decode_latents(vae: AutoencoderKLLTX2Video, latents: Tensor, chunk: int = 8) -> Generator[Tensor, None, None]:
    """Decode normalised latents (B, C, T, h, w) chunk by chunk; yields uint8 (B, f, H, W, 3), 8 T - 7 frames in all.

    A causal decoder keeps the last input frames of each convolution, so chunks equal decoding at once; memory does not
    grow with T. A decoder that is not causal is run on the whole clip.
    """
    if not vae.config["decoder_causal"]:
        yield to_uint8(vae.decode(denormalise(vae, latents).to(vae.dtype), return_dict=False)[0])
        return
    yield from decode_parts(vae, latents.split(chunk, dim=2))


def decode_parts(vae: AutoencoderKLLTX2Video, parts: Iterable[Tensor]) -> Generator[Tensor, None, None]:
    """As `decode_latents`, of latents that come in parts (B, C, t, h, w). ValueError for a decoder that is not
    causal.
    """
    past = None
    for part in parts:
        frames, past = decode_more(vae, part, past)
        yield frames


@torch.no_grad()
def decode_more(
    vae: AutoencoderKLLTX2Video, latents: Tensor, past: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Frames uint8 (B, f, H, W, 3) of normalised latents (B, C, T, h, w) that follow the ones that left `past`, and the
    past of what follows them. ValueError for a decoder that is not causal.
    """
    if not vae.config["decoder_causal"]:
        raise ValueError("this autoencoder decodes whole videos: one that streams has vae decoder_causal=True")
    left: dict[str, Tensor] = {}
    with _streaming(vae.decoder, past or {}, left):
        return to_uint8(vae.decoder(denormalise(vae, latents).to(vae.dtype), causal=True)), left


_one_at_a_time = threading.Lock()  # a decoder's layers are changed while it runs


@contextmanager
def _streaming(decoder: nn.Module, past: Mapping[str, Tensor], left: dict[str, Tensor]) -> Iterator[None]:
    """A causal LTX-2 decoder goes on from what its convolutions kept of a video, and leaves that anew."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d, LTX2VideoUpsampler3d

    with _one_at_a_time:
        _channels_last(decoder)
        try:
            for name, module in decoder.named_modules():
                if isinstance(module, LTX2VideoCausalConv3d):
                    module.forward = _StreamingConv(module, name, past, left, _take_norm(decoder, name))
                elif isinstance(module, LTX2VideoUpsampler3d):
                    module.forward = _StreamingUpsample(module, begun=bool(past))
            yield
        finally:
            for module in decoder.modules():
                module.__dict__.pop("forward", None)


@torch.inference_mode(False)
def _channels_last(decoder: nn.Module) -> None:
    """Lay weights on a GPU as its convolutions read them, once; they stay the same numbers."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d) and module.weight.is_cuda:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


_NORMS = {  # what comes before a convolution, by its name
    "conv1": ("norm1", "nonlinearity"),
    "conv2": ("norm2", "nonlinearity"),
    "conv_out": ("norm_out", "conv_act"),
}


def _take_norm(decoder: nn.Module, name: str) -> float | None:
    """The eps of the norm before the SiLU before a convolution, which takes over both; None where there are none, or a
    timestep's scale between them.
    """
    of, _, name = name.rpartition(".")
    block: Any = decoder.get_submodule(of)
    if name not in _NORMS or block.scale_shift_table is not None:
        return None
    norm, silu = (getattr(block, each) for each in _NORMS[name])
    norm.forward = silu.forward = _unchanged
    return norm.eps


def _unchanged(x: Tensor) -> Tensor:
    return x


class _StreamingConv:
    """A causal convolution after the last kernel-1 frames of the past, at first its own first frame repeated; with the
    norm and SiLU before it, where eps is the norm's.
    """

    def __init__(
        self,
        layer: LTX2VideoCausalConv3d,
        name: str,
        past: Mapping[str, Tensor],
        left: dict[str, Tensor],
        eps: float | None,
    ) -> None:
        self.layer, self.name, self.past, self.left, self.eps = layer, name, past, left, eps

    def __call__(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        conv, (reach, rows, columns) = self.layer.conv, (size - 1 for size in self.layer.kernel_size)
        mirrored = conv.padding_mode == "reflect"
        border = (rows // 2, columns // 2) if mirrored else (0, 0)
        past = self.past.get(self.name)
        hidden_states, self.left[self.name] = conv_input(hidden_states, past, reach, border, self.eps)
        if not mirrored:
            return conv(hidden_states)
        return F.conv3d(hidden_states, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


class _StreamingUpsample:
    """Depth-to-space upsampling whose leading frames are dropped once a video, not once a call."""

    def __init__(self, layer: LTX2VideoUpsampler3d, begun: bool) -> None:
        self.layer, self.begun = layer, begun

    def __call__(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        out = self._to_space(self.layer.conv(hidden_states, causal=causal))
        if self.layer.residual:
            skip = self._to_space(hidden_states)
            out.unflatten(1, (-1, skip.shape[1])).add_(skip[:, None])
        return out[:, :, 0 if self.begun else self.layer.stride[0] - 1 :]

    def _to_space(self, x: Tensor) -> Tensor:
        """One copy, which keeps channels last."""
        (stride_t, stride_h, stride_w), (b, _, t, h, w) = self.layer.stride, x.shape
        parts = x.unflatten(1, (-1, stride_t, stride_h, stride_w)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        shape = b, parts.shape[1], t * stride_t, h * stride_h, w * stride_w
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if last else torch.contiguous_format
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        out.view(parts.shape).copy_(parts)
        return out

"""The video autoencoder: diffusers' LTX-2 VAE, its normalised latents, and exact decoding in constant memory.

Latents are the posterior mode, normalised per channel: (z - mean) * scaling / std (SANA-WM section 1.10). Pixels are
uint8 (B, F, H, W, 3); F = 8 k + 1 frames give k + 1 latent frames, the first of which holds one frame alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d, LTX2VideoUpsampler3d
from torch import Tensor

from longtake.model.config import WorldModelConfig


def build_vae(config: WorldModelConfig) -> AutoencoderKLLTX2Video:
    """The preset's autoencoder with random weights, float32."""
    frames, rows, _ = config.vae_stride
    vae = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        temporal_compression_ratio=frames,
        spatial_compression_ratio=rows,
        **config.vae,
    )
    # torch's default initialisation shrinks the signal of a deep stack without affine norms: scale to unit gain.
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return vae


def to_pixels(video: Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]."""
    return video.movedim(-1, 1).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """float (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3)."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def normalise(vae: AutoencoderKLLTX2Video, latents: Tensor) -> Tensor:
    """Raw latents (B, C, T, h, w) to unit scale, float32."""
    mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
    return (latents.float() - mean) * vae.config.scaling_factor / std


def denormalise(vae: AutoencoderKLLTX2Video, latents: Tensor) -> Tensor:
    """Inverse of `normalise`."""
    mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
    return latents.float() * std / vae.config.scaling_factor + mean


@torch.no_grad()
def encode_frames(vae: AutoencoderKLLTX2Video, frames: Tensor) -> Tensor:
    """Normalised latents (B, C, T, h, w), float32, of uint8 frames (B, F, H, W, 3). ValueError unless F = 8 k + 1."""
    stride = vae.temporal_compression_ratio
    if (frames.shape[1] - 1) % stride:
        raise ValueError(
            f"{frames.shape[1]} frames cannot be encoded: give {stride} k + 1 frames (1, {stride + 1}, ...)"
        )
    return normalise(vae, vae.encode(to_pixels(frames).to(vae.dtype)).latent_dist.mode())


@torch.no_grad()
def decode_latents(vae: AutoencoderKLLTX2Video, latents: Tensor, chunk: int = 8) -> Iterator[Tensor]:
    """Decode normalised latents (B, C, T, h, w) chunk by chunk; yields uint8 (B, f, H, W, 3), 8 T - 7 frames in all.

    A causal decoder keeps the last input frames of each convolution, so chunks equal decoding at once; memory does not
    grow with T. A decoder that is not causal is run on the whole clip.
    """
    raw = denormalise(vae, latents).to(vae.dtype)
    if not vae.config.decoder_causal:
        yield to_uint8(vae.decode(raw).sample)
        return
    with _StreamingDecoder(vae) as decoder:
        for piece in raw.split(chunk, dim=2):
            yield to_uint8(decoder(piece))


class _StreamingDecoder:
    """A causal LTX-2 decoder that continues where its last call ended."""

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        self.decoder = vae.decoder

    def __enter__(self) -> _StreamingDecoder:
        for module in self.decoder.modules():
            if isinstance(module, LTX2VideoCausalConv3d):
                module._tail = None
                module.forward = MethodType(_streaming_conv, module)
            elif isinstance(module, LTX2VideoUpsampler3d):
                module._started = False
                module.forward = MethodType(_streaming_upsample, module)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.decoder.modules():
            for name in ("_tail", "_started", "forward"):
                module.__dict__.pop(name, None)

    def __call__(self, latents: Tensor) -> Tensor:
        return self.decoder(latents, causal=True)


def _streaming_conv(self: LTX2VideoCausalConv3d, hidden: Tensor, causal: bool = True) -> Tensor:
    """The convolution with the last kernel-1 frames of the previous call on the left (at first: its first frame
    repeated).
    """
    past = self.kernel_size[0] - 1
    if self._tail is None:
        self._tail = hidden[:, :, :1].expand(-1, -1, past, -1, -1)
    hidden = torch.cat([self._tail, hidden], dim=2)
    self._tail = hidden[:, :, hidden.shape[2] - past :].clone()
    return self.conv(hidden)


def _streaming_upsample(self: LTX2VideoUpsampler3d, hidden: Tensor, causal: bool = True) -> Tensor:
    """Depth-to-space upsampling whose leading frames are dropped once a video, not once a call."""
    stride_t, stride_h, stride_w = self.stride

    def to_space(x: Tensor) -> Tensor:
        b, _, t, h, w = x.shape
        x = x.reshape(b, -1, stride_t, stride_h, stride_w, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, -1, t * stride_t, h * stride_h, w * stride_w)

    out = to_space(self.conv(hidden, causal=causal))
    if self.residual:
        skip = to_space(hidden)
        out = out + skip.repeat(1, out.shape[1] // skip.shape[1], 1, 1, 1)
    drop = 0 if self._started else stride_t - 1
    self._started = True
    return out[:, :, drop:]

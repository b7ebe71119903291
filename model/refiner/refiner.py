"""The refiner's network: diffusers' LTX-2 transformer, video stream only, over a whole clip (SANA-WM section 3.4).

The first latent frame is the sink: timestep 0, never changed; all other frames are denoised jointly.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

from longtake.model.config import WorldModelConfig
from longtake.model.samplers.flow_euler import euler

# One head of 8 channels is the least that LTX-2's audio stream can be built with; it is deleted right after.
_SMALLEST_AUDIO: dict[str, Any] = dict(
    audio_num_attention_heads=1, audio_attention_head_dim=8, audio_cross_attention_dim=8
)


class Refiner(nn.Module):
    """refiner(latents (B, C, T, h, w), timestep (B, T) in [0, 1000], text (B, L, D), text_mask (B, L)) -> velocity."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        spec = config.refiner
        width = spec.num_heads * spec.head_dim
        self.fps = config.fps
        self.sigmas = spec.sigmas
        self.transformer = SanaWMLTX2RefinerTransformer3DModel(
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            cross_attention_dim=width,
            num_layers=spec.num_layers,
            caption_channels=spec.text_dim,
            vae_scale_factors=config.vae_stride,
            rope_type="split",
            **_SMALLEST_AUDIO,
        )
        _delete_audio(self.transformer)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        batch, _, frames, height, width = latents.shape
        positions = self.transformer.build_rotary_emb_for_absolute_positions(
            batch_size=batch,
            frame_positions=list(range(frames)),
            height=height,
            width=width,
            device=latents.device,
            fps=self.fps,
        )
        velocity = self.transformer(
            rearrange(latents, "b c t h w -> b (t h w) c"),
            encoder_hidden_states=text,
            timestep=timestep.repeat_interleave(height * width, dim=1),
            video_rotary_emb=positions,
            encoder_attention_mask=text_mask,
            return_dict=False,
        )[0]
        return rearrange(velocity, "b (t h w) c -> b c t h w", t=frames, h=height)

    @torch.no_grad()
    def refine(self, latents: Tensor, noise: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Refine stage-1 latents from x = (1 - sigma_0) latents + sigma_0 noise down the truncated schedule."""
        start = (1 - self.sigmas[0]) * latents + self.sigmas[0] * noise
        start[:, :, :1] = latents[:, :, :1]
        return euler(lambda x, timestep: self(x, timestep, text, text_mask), start, self.sigmas, frozen_frames=1)


def _delete_audio(transformer: nn.Module) -> None:
    """Remove every audio parameter: the video stream never reads them."""
    for module in list(transformer.modules()):
        for name in [*module._modules, *module._parameters]:
            if "audio" in name or "a2v" in name or "v2a" in name or name.startswith("av_cross"):
                delattr(module, name)

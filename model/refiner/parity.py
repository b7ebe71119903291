"""How far the refiner is from diffusers' `SanaWMLTX2Refiner`, with the same random weights, text and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel
from diffusers.pipelines.sana_wm.refiner import SanaWMLTX2Refiner
from torch import Tensor, nn

from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.model.refiner.refiner import SINK, Refiner, block_sizes

# One head of 8 channels is the least that LTX-2's audio stream can be built with; no video passes through it.
_SMALLEST_AUDIO: dict[str, Any] = dict(
    audio_num_attention_heads=1, audio_attention_head_dim=8, audio_cross_attention_dim=8
)


def diffusers_transformer(config: WorldModelConfig) -> SanaWMLTX2RefinerTransformer3DModel:
    """diffusers' network of the same size, random weights."""
    spec = config.refiner
    return SanaWMLTX2RefinerTransformer3DModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_attention_heads=spec.num_heads,
        attention_head_dim=spec.head_dim,
        cross_attention_dim=spec.num_heads * spec.head_dim,
        num_layers=spec.num_layers,
        caption_channels=spec.text_dim,
        vae_scale_factors=config.vae_stride,
        rope_type="split",
        **_SMALLEST_AUDIO,
    ).eval()


def of_same_weights(config: WorldModelConfig, theirs: SanaWMLTX2RefinerTransformer3DModel) -> Refiner:
    """Our refiner with diffusers' weights, the same tensors."""
    with torch.device("meta"):
        ours = Refiner(config).eval()
    known = theirs.state_dict()
    ours.transformer.load_state_dict({name: known[name] for name in ours.transformer.state_dict()}, assign=True)
    return ours


class _WithFeatures(SanaWMLTX2Refiner):
    """diffusers' pipeline with `given` features and mask in the place of its text encoder."""

    given: tuple[Tensor, Tensor]

    def _encode_prompt(self, prompt: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        text, mask = self.given
        return text.to(device, dtype), mask.to(device)


@dataclass
class Pair:
    """Both refiners, which go block by block, and what they are given: latents (B, C, T, h, w), text and its mask."""

    config: WorldModelConfig
    latents: Tensor
    text: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        with self.latents.device:
            theirs = diffusers_transformer(self.config)
        nn.Module.to(theirs, self.latents.dtype)  # diffusers' own `to` warns
        self.refiner, nothing = of_same_weights(self.config, theirs), None
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.peer = _WithFeatures(theirs, nothing, nothing, nothing, scheduler)  # type: ignore[arg-type]
        self.peer.given = self.text, self.mask
        self.peer.set_progress_bar_config(disable=True)

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.latents.device).manual_seed(0)

    @torch.no_grad()
    def theirs(self, frames: int) -> Tensor:
        """The first latent frames, refined by diffusers."""
        spec = self.config.refiner
        assert spec.block_size is not None
        return self.peer(
            self.latents[:, :, :frames],
            "",
            fps=self.config.fps,
            generator=self._generator(),
            block_size=spec.block_size,
            kv_max_frames=spec.window,
            sigmas=spec.sigmas,
            output_type="latent",
        )

    @torch.no_grad()
    def ours(self, frames: int) -> Tensor:
        """The same frames, refined by us with the same noise."""
        latents, generator = self.latents[:, :, :frames], self._generator()
        noise, first = torch.zeros_like(latents), SINK
        for size in block_sizes(frames - SINK, self.config.refiner.block_size or frames):
            part = noise[:, :, first : first + size]
            part.copy_(torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype))
            first += size
        return self.refiner.refine(latents.float(), noise.float(), self.text, self.mask)


@dataclass(frozen=True)
class RefinerCase:
    """One comparison of a whole refinement, block by block."""

    name: str
    config: WorldModelConfig
    frames: int
    height: int
    width: int
    batch: int = 1

    def relative_error(self, seed: int = 0) -> float:
        """|ours - theirs| / |theirs| in float32, of all frames but the sink."""
        torch.manual_seed(seed)
        latents = torch.randn(self.batch, self.config.latent_channels, self.frames, self.height, self.width)
        text, mask = torch.randn(self.batch, 12, self.config.refiner.text_dim), torch.rand(self.batch, 12) < 0.7
        mask[:, 0] = True
        pair = Pair(self.config, latents, text, mask)
        return relative_error(pair.ours(self.frames), pair.theirs(self.frames))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| of all frames but the sink."""
    ours, theirs = (x[:, :, SINK:].float() for x in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


_TINY = replace(presets.TINY, refiner=replace(presets.TINY.refiner, block_size=3))
_TRUE_HEADS = replace(
    _TINY,
    refiner=replace(_TINY.refiner, num_layers=2, num_heads=2, head_dim=128, sigmas=presets.SANA_WM.refiner.sigmas),
)

REFINER_CASES = (
    RefinerCase("refiner_tiny_16x3x5", _TINY, 16, 3, 5),
    RefinerCase("refiner_head128_9x2x3_batch2", _TRUE_HEADS, 9, 2, 3, batch=2),
)

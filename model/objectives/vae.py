"""The autoencoder's objective (stage 0)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.objective import Batch, Loss, Objective
from longtake.model.vae import build_vae, make_causal, to_pixels, to_uint8


class VAEObjective(Objective):
    """Reconstruction of video windows: |e| + squared + edge terms, and a KL term that keeps the latents smooth.

    batch["frames"]: uint8 (B, F, H, W, 3), F = 8 k + 1; about half of the windows are mirrored. freeze_encoder trains
    the decoder alone, from an autoencoder that was loaded: latents encoded before remain valid.
    """

    samples_pixels = True
    latent_moments: Tensor

    def __init__(
        self,
        config: WorldModelConfig,
        squared_weight: float = 10.0,
        edge_weight: float = 0.25,
        kl_weight: float = 1e-3,
        freeze_encoder: bool = False,
    ):
        super().__init__()
        self.config, self.vae = config, build_vae(config)
        self.freeze_encoder = freeze_encoder
        self.vae.encoder.requires_grad_(not freeze_encoder)
        self.squared_weight, self.edge_weight, self.kl_weight = squared_weight, edge_weight, kl_weight
        self.register_buffer("latent_moments", torch.zeros(2, config.latent_channels), persistent=True)

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        pixels = to_pixels(batch["frames"])
        mirror = draws.uniform() < 0.5
        pixels = torch.where(mirror[:, None, None, None, None], pixels.flip(-1), pixels)
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = draws.normal(*mean.shape[1:])
        decoded = self.vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
        error = decoded.float() - pixels
        squared = error.square().mean()
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + self.squared_weight * squared + self.edge_weight * edges + self.kl_weight * kl
        if not self.freeze_encoder:
            self._track(mean.detach())
        return loss, {"psnr_db": 10 * torch.log10(4 / squared.detach()), "kl": kl.detach()}

    def _track(self, mean: Tensor, momentum: float = 0.995) -> None:
        """Moving average of each channel's first and second moment, from which `export` normalises the latents."""
        moments = torch.stack([mean.mean((0, 2, 3, 4)), mean.square().mean((0, 2, 3, 4))])
        fresh = self.latent_moments.abs().sum() == 0
        average = torch.where(fresh, moments, self.latent_moments.lerp(moments, 1 - momentum))
        self.latent_moments.copy_(torch.where(moments.isfinite().all(), average, self.latent_moments))

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Draws) -> Tensor:
        """True frames beside reconstructed ones: uint8 (F, H, 2 W, 3)."""
        frames = batch["frames"][:1]
        posterior = self.vae.encode(to_pixels(frames), return_dict=False)[0]
        decoded = self.vae.decode(posterior.mode(), return_dict=False)[0]
        return torch.cat([frames, to_uint8(decoded)], dim=3)[0]

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `vae/` with the normalisation measured while training. A dead channel keeps a tenth of unit scale."""
        if not self.freeze_encoder:
            first, second = self.latent_moments
            self.vae.latents_mean.copy_(first)
            self.vae.latents_std.copy_((second - first.square()).clamp(min=0.01).sqrt())
        weights.save_part(self.vae, folder, "vae", dtype)

    def load(self, folder: Path) -> None:
        """A decoder that sees later frames becomes one that does not, where the configuration says so."""
        weights.load_part(self.vae, folder, "vae")
        saved = weights.config_for(self.config, folder).vae
        if self.config.vae.get("decoder_causal", True) and not saved.get("decoder_causal", True):
            make_causal(self.vae)

    def start(self, parts: Mapping[str, Path]) -> None:
        if "vae" in parts:
            self.load(parts["vae"])


OBJECTIVE = VAEObjective

"""What each training stage minimises: modules that turn a batch into a loss, and write the weights they trained.

objective(batch, generator) -> (loss, metrics); every random number comes from `generator`, which lives on the batch's
device. Latents (B, C, T, h, w) are normalised; poses are raw-frame c2w (B, F, 4, 4) and intrinsics (B, F, 4) in pixels
of config.image_size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.model import weights
from longtake.model.camera import CameraFeatures, camera_features
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel
from longtake.model.refiner import Refiner
from longtake.model.samplers.flow_euler import euler, sample_training_sigma, schedule
from longtake.model.text import build_text_encoder
from longtake.model.vae import build_vae, decode_latents, to_pixels, to_uint8

Batch = dict[str, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]


class VAEObjective(nn.Module):
    """Reconstruction of video windows: |e| + squared + edge terms, and a KL term that keeps the latents smooth.

    batch["frames"]: uint8 (B, F, H, W, 3), F = 8 k + 1. freeze_encoder trains the decoder alone, from an autoencoder
    that was loaded: latents encoded before remain valid.
    """

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
        self.vae = build_vae(config)
        self.freeze_encoder = freeze_encoder
        self.vae.encoder.requires_grad_(not freeze_encoder)
        self.squared_weight, self.edge_weight, self.kl_weight = squared_weight, edge_weight, kl_weight
        self.register_buffer("latent_moments", torch.zeros(2, config.latent_channels), persistent=True)

    def forward(self, batch: Batch, generator: torch.Generator) -> Loss:
        pixels = to_pixels(batch["frames"])
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
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
        self.latent_moments.copy_(torch.where(fresh, moments, self.latent_moments.lerp(moments, 1 - momentum)))

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
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
        weights.load_part(self.vae, folder, "vae")


class FlowObjective(nn.Module):
    """Flow matching of the stage-1 network (section 4.2), its text encoder trained along when it is a small one.

    A sigma a clip, logit-normal and shifted. With probability `image_condition` the first latent frame is the clean
    image at timestep 0, without loss. `caption_dropout` puts the learned null caption, `camera_dropout` leaves the
    camera out of a batch. batch: latents, c2w, intrinsics, tokens int64 (B, L), tokens_mask bool (B, L).
    """

    def __init__(
        self,
        config: WorldModelConfig,
        image_condition: float = 0.9,
        caption_dropout: float = 0.1,
        camera_dropout: float = 0.0,
        shift: float | None = None,
    ):
        super().__init__()
        self.config = config
        self.world_model = WorldModel(config)
        self.text = build_text_encoder(config)
        self.image_condition, self.caption_dropout, self.camera_dropout = (
            image_condition,
            caption_dropout,
            camera_dropout,
        )
        self.shift = config.sampler.shift if shift is None else shift

    def forward(self, batch: Batch, generator: torch.Generator) -> Loss:
        latents = batch["latents"].float()
        count, device = latents.shape[0], latents.device
        sigma = sample_training_sigma(count, self.shift, generator)
        keep_image = torch.rand(count, generator=generator, device=device) < self.image_condition
        frame_sigma = sigma[:, None].repeat(1, latents.shape[2])
        frame_sigma[:, 0] *= ~keep_image
        noise = torch.randn(latents.shape, generator=generator, device=device)
        level = frame_sigma[:, None, :, None, None]
        noisy = (1 - level) * latents + level * noise
        text, mask = self.encode_text(batch, generator)
        leave_out = torch.rand(count, generator=generator, device=device)[0] < self.camera_dropout
        camera = None if self.camera_dropout and bool(leave_out) else self.camera(batch)
        velocity = self.world_model(noisy, 1000 * frame_sigma, text, mask, camera).float()
        error = (velocity - (noise - latents)).square().mean((1, 3, 4))
        counted = torch.ones_like(error)
        counted[:, 0] = (~keep_image).float()
        per_clip = (error * counted).sum(1) / counted.sum(1)
        low, high = sigma < 0.6, sigma >= 0.9
        metrics = {
            "loss_low_sigma": (per_clip * low).sum() / low.sum().clamp(min=1),
            "loss_high_sigma": (per_clip * high).sum() / high.sum().clamp(min=1),
        }
        return per_clip.mean(), {name: value.detach() for name, value in metrics.items()}

    def camera(self, batch: Batch) -> CameraFeatures:
        with torch.autocast(batch["c2w"].device.type, enabled=False):
            return camera_features(
                batch["c2w"].float(), batch["intrinsics"].float(), self.config.image_size, self.config.vae_stride
            )

    def encode_text(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Caption features and mask, a random part of them replaced by the null caption."""
        mask = batch["tokens_mask"]
        text = self.text(batch["tokens"], mask)
        if generator is None:
            return text, mask
        drop = torch.rand(len(mask), generator=generator, device=mask.device) < self.caption_dropout
        text = torch.where(drop[:, None, None], self.world_model.null_caption.to(text.dtype), text)
        return text, mask | drop[:, None]

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator, num_steps: int | None = None) -> Tensor:
        """Latents (B, C, T, h, w) generated from each clip's first latent frame, caption and camera."""
        latents = batch["latents"].float()
        start = torch.randn(latents.shape, generator=generator, device=latents.device)
        start[:, :, :1] = latents[:, :, :1]
        return self.denoise(
            batch, start, schedule(num_steps or self.config.sampler.num_steps, self.config.sampler.shift)
        )

    def denoise(self, batch: Batch, start: Tensor, sigmas: Tensor) -> Tensor:
        text, mask = self.encode_text(batch)
        camera = self.camera(batch)
        return euler(lambda x, t: self.world_model(x, t, text, mask, camera), start, sigmas, frozen_frames=1)

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        weights.save_part(self.world_model, folder, "dit", dtype)
        weights.save_part(self.text, folder, "text", dtype)

    def load(self, folder: Path) -> None:
        weights.load_part(self.world_model, folder, "dit")
        weights.load_part(self.text, folder, "text")


class RefinerObjective(nn.Module):
    """Truncated-sigma flow matching (section 4.4) from stage-1 latents x_l to true latents x_h.

    x_1 = (1 - s) x_l + s noise; x_a = (1 - a) x_h + a x_1; the velocity is (x_1 - x_h) / s at timestep 1000 a s; s is
    the schedule's first sigma. x_l is what the frozen stage 1 makes of x_h noised to a random sigma. Batches as for
    `FlowObjective`.
    """

    def __init__(self, config: WorldModelConfig, stage1_steps: int = 4):
        super().__init__()
        self.config, self.stage1_steps = config, stage1_steps
        self.refiner = Refiner(config)
        self.stage1 = FlowObjective(config).requires_grad_(False)

    def forward(self, batch: Batch, generator: torch.Generator) -> Loss:
        target = batch["latents"].float()
        count, device = target.shape[0], target.device
        text, mask = self.stage1.encode_text(batch)
        first = self.config.refiner.sigmas[0]
        coarse = self.stage1_reconstruction(batch, generator)
        noise = torch.randn(target.shape, generator=generator, device=device)
        start = (1 - first) * coarse + first * noise
        along = torch.rand(count, generator=generator, device=device)
        frame_along = along[:, None].repeat(1, target.shape[2])
        frame_along[:, 0] = 0
        level = frame_along[:, None, :, None, None]
        velocity = self.refiner((1 - level) * target + level * start, 1000 * first * frame_along, text, mask).float()
        error = (velocity - (start - target) / first)[:, :, 1:].square().mean()
        return error, {"coarse_mse": (coarse - target).square().mean()}

    @torch.no_grad()
    def stage1_reconstruction(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Stage 1's x_l: the clip noised to one random sigma of the batch and denoised in a few steps."""
        target = batch["latents"].float()
        high = torch.rand((), generator=generator, device=target.device).item() * 0.4 + 0.55
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        start = (1 - high) * target + high * noise
        start[:, :, :1] = target[:, :, :1]
        return self.stage1.denoise(batch, start, high * torch.linspace(1, 0, self.stage1_steps + 1))

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Refined stage-1 generations (B, C, T, h, w)."""
        coarse = self.stage1.sample(batch, generator)
        noise = torch.randn(coarse.shape, generator=generator, device=coarse.device)
        return self.refiner.refine(coarse, noise, *self.stage1.encode_text(batch))

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        weights.save_part(self.refiner, folder, "refiner", dtype)

    def load(self, folder: Path) -> None:
        """The frozen stage 1 from `folder`; the refiner too where the folder has one."""
        self.stage1.load(folder)
        if (folder / "refiner").is_dir():
            weights.load_part(self.refiner, folder, "refiner")


Objective = VAEObjective | FlowObjective | RefinerObjective
_OBJECTIVES = {"vae": VAEObjective, "flow": FlowObjective, "refiner": RefinerObjective}


def build_objective(
    kind: str, config: WorldModelConfig, options: dict | None = None, init: Path | None = None
) -> Objective:
    """The objective called `kind` ("vae", "flow" or "refiner") on the CPU, from the weights in `init` when given."""
    objective = _OBJECTIVES[kind](config, **(options or {}))
    if init is not None:
        objective.load(Path(init))
    return objective


def decode_sample(latents: Tensor, config: WorldModelConfig, vae_folder: Path) -> Tensor:
    """Pixels uint8 (F, H, W, 3) of the first clip of `latents`."""
    vae: Any = weights.load_part(build_vae(config), vae_folder, "vae").to(latents.device)
    return torch.cat(list(decode_latents(vae, latents[:1])), dim=1)[0]

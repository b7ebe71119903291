"""Flow matching of stage 1 (stages 1 to 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtake.model import sana_video, weights
from longtake.model.camera import CameraFeatures, camera_features
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes, each_frame
from longtake.model.dit.time_axis import WHOLE_CLIP, TimeAxis
from longtake.model.dit.world_model import WorldModel
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.objective import Batch, Loss, Objective
from longtake.model.samplers.chunk_flow import chunk_flow_euler, chunk_training_sigma
from longtake.model.samplers.flow_euler import euler, sampler_sigmas, training_sigma
from longtake.model.stream import ChunkStream
from longtake.model.text import build_text_encoder


class FlowObjective(Objective):
    """Flow matching of the stage-1 network (section 4.2), its text encoder trained along when it is a small one.

    A sigma a clip, logit-normal and shifted; of a chunk-causal network one for each chunk. With probability
    `image_condition` the first latent frame is the clean image at timestep 0, without loss. `caption_dropout` puts the
    learned null caption, `camera_dropout` leaves a clip's camera out. replace_gdn: weights to start from may have GDN
    in every block; those that are softmax attention here begin with the replaced ones' weights. A SANA-Video to start
    from has no text encoder: a small one keeps its random weights. batch: latents, c2w, intrinsics, tokens_mask bool
    (B, L) with tokens int64 (B, L), or, of a frozen encoder, text float16 (B, L, D); and frames int64 (B,) where clips
    are padded at their ends: how many latent frames of each are real. A clip's draws and its loss, the mean over its
    real frames that are not clean, are those of the clip alone.

    Where `time_axis` holds a stretch of each clip, batches are still of whole clips, and the loss is the stretch's
    share times the number of stretches: its mean over the ranks is the clips' loss.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        image_condition: float = 0.9,
        caption_dropout: float = 0.1,
        camera_dropout: float = 0.0,
        shift: float | None = None,
        replace_gdn: bool = False,
    ):
        super().__init__()
        self.config = config
        self.world_model = WorldModel(config)
        self.text = None if config.text.frozen else build_text_encoder(config)
        self.image_condition, self.caption_dropout, self.camera_dropout = (
            image_condition,
            caption_dropout,
            camera_dropout,
        )
        self.shift = config.sampler.shift if shift is None else shift
        self.replace_gdn = replace_gdn

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        latents, frames = batch["latents"].float(), batch.get("frames")
        axis, frame_sigma = self._axis_and_sigma(latents.shape[2], draws)
        sigma = frame_sigma.mean(1)
        keep_image = draws.uniform() < self.image_condition
        frame_sigma[:, 0] *= ~keep_image
        noise = draws.noise(latents.shape[1:], frames)
        level = frame_sigma[:, None, :, None, None]
        noisy = (1 - level) * latents + level * noise
        text, mask = self.encode_text(batch, draws)
        seen = draws.uniform() >= self.camera_dropout if self.camera_dropout else None
        camera = self.camera(batch)
        camera = CameraFeatures(axis.held(camera.conditions, 1), axis.held(camera.plucker, 2))
        timestep = 1000 * axis.held(frame_sigma, 1)
        velocity = self.world_model(axis.held(noisy, 2), timestep, text, mask, camera, axis, seen, frames).float()
        error = (velocity - axis.held(noise - latents, 2)).square().mean((1, 3, 4))
        counted = (frame_sigma > 0).float()
        if frames is not None:
            counted *= torch.arange(latents.shape[2], device=frames.device) < frames[:, None]
        # A clip of one frame, its image, has no loss.
        per_clip = axis.stretches * (error * axis.held(counted, 1)).sum(1) / counted.sum(1).clamp(min=1)
        low, high = sigma < 0.6, sigma >= 0.9
        metrics = {
            "loss_low_sigma": (per_clip * low).sum() / low.sum().clamp(min=1),
            "loss_high_sigma": (per_clip * high).sum() / high.sum().clamp(min=1),
        }
        return per_clip.mean(), {name: value.detach() for name, value in metrics.items()}

    def _axis_and_sigma(self, frames: int, draws: Draws) -> tuple[TimeAxis, Tensor]:
        """The axis of clips of so many latent frames, and a sigma for each frame (B, T)."""
        normal = draws.normal()
        if not self.config.chunk_causal:
            return self.time_axis, training_sigma(normal, self.shift)[:, None].repeat(1, frames)
        sizes = chunk_sizes(frames, self.config.chunk_size)
        uniform = draws.uniform(), draws.uniform(), draws.uniform(len(sizes))
        sigma = chunk_training_sigma(normal, *uniform, self.shift)
        axis = ChunkCausal(sizes, self.config.chunk_window) if self.time_axis is WHOLE_CLIP else self.time_axis
        return axis, each_frame(sigma, sizes)

    def camera(self, batch: Batch) -> CameraFeatures:
        with torch.autocast(batch["c2w"].device.type, enabled=False):
            return camera_features(
                batch["c2w"].float(), batch["intrinsics"].float(), self.config.image_size, self.config.vae_stride
            )

    def encode_text(self, batch: Batch, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Caption features and mask, a random part of them replaced by the null caption."""
        mask = batch["tokens_mask"]
        text = batch["text"].float() if self.text is None else self.text(batch["tokens"], mask)
        if draws is None:
            return text, mask
        drop = draws.uniform() < self.caption_dropout
        text = torch.where(drop[:, None, None], self.world_model.null_caption.to(text.dtype), text)
        return text, mask | drop[:, None]

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Draws, num_steps: int | None = None) -> Tensor:
        """Latents (B, C, T, h, w) generated from each clip's first latent frame, caption and camera."""
        latents = batch["latents"].float()
        start, sampler = draws.noise(latents.shape[1:], batch.get("frames")), self.config.sampler
        sigmas, image = sampler_sigmas(sampler, num_steps), latents[:, :, :1]
        if self.config.chunk_causal:
            network = ChunkStream(self.world_model, *self.encode_text(batch), self.camera(batch))
            sizes = chunk_sizes(latents.shape[2], self.config.chunk_size)
            noise = start.split(sizes, 2)

            def fresh(chunk: int, frames: int, step: int) -> Tensor:
                return draws.normal(latents.shape[1], frames, *latents.shape[3:])

            given = sizes, sigmas.tolist(), sampler.chunk_interval, image, fresh if sampler.fresh_noise else None
            return torch.cat(list(chunk_flow_euler(network, lambda chunk, _: noise[chunk], *given)), 2)
        start[:, :, :1] = image
        return self.denoise(batch, start, sigmas)

    def denoise(self, batch: Batch, start: Tensor, sigmas: Tensor, highest: Tensor | None = None) -> Tensor:
        """`start` integrated along `sigmas`, times the clip's own `highest` (B,) where that is given."""
        text, mask = self.encode_text(batch)
        camera = self.camera(batch)
        share = start.new_ones(len(start)) if highest is None else highest

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:  # by `sigmas`, of which a clip's are a share
            inputs = x, share[:, None] * timestep, text, mask, camera
            return share[:, None, None, None, None] * self.world_model(*inputs, frames=batch.get("frames"))

        return euler(velocity, start, sigmas, frozen_frames=1)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, draws: Draws, sigma: Tensor, num_steps: int) -> Tensor:
        """The batch's clips, noised to `sigma` (B,) but for the first frame, and denoised in a few steps."""
        target, level = batch["latents"].float(), sigma[:, None, None, None, None]
        start = (1 - level) * target + level * draws.normal(*target.shape[1:])
        start[:, :, :1] = target[:, :, :1]
        sigmas = torch.linspace(1, 0, num_steps + 1)
        if not self.config.chunk_causal:
            return self.denoise(batch, start, sigmas, sigma)
        stream = ChunkStream(self.world_model, *self.encode_text(batch), self.camera(batch))
        sizes = chunk_sizes(target.shape[2], self.config.chunk_size)
        noisy, interval = start.split(sizes, 2), self.config.sampler.chunk_interval
        given = sizes, sigmas.tolist(), interval, target[:, :, :1]
        return torch.cat(list(chunk_flow_euler(_Shares(stream, sigma), lambda chunk, _: noisy[chunk], *given)), 2)

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        weights.save_part(self.world_model, folder, "dit", dtype)
        if self.text is not None:
            weights.save_part(self.text, folder, "text", dtype)

    def load(self, folder: Path) -> None:
        if video := sana_video.find(folder):
            sana_video.start(self.world_model, video)
            return
        if self.replace_gdn and not weights.config_for(self.config, folder).softmax_every:
            gdn = WorldModel(dataclasses.replace(self.config, softmax_every=0))
            weights.load_part(gdn, folder, "dit")
            self.world_model.start_from_gdn(gdn)
        else:
            weights.load_part(self.world_model, folder, "dit")
        if self.text is not None:
            weights.load_part(self.text, folder, "text")


@dataclass(frozen=True)
class _Shares:
    """A network of chunks by sigmas of which a clip's are a `share` (B,)."""

    network: ChunkStream
    share: Tensor

    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        return self.share[:, None, None, None, None] * self.network.velocity(x, self.share[:, None] * timestep, sizes)

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        self.network.keep(x, sizes)


OBJECTIVE = FlowObjective

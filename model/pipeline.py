"""From an image, a caption and a trajectory to video: the parts of a world model, loaded together and called one by
one.

Each method is one step, so that a server or a batch job can run the steps on different machines: encode, rollout (stage
1), refine (stage 2), decode.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from longtake.model import float8, presets, weights
from longtake.model.camera import CameraFeatures, Trajectory
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import chunk_sizes
from longtake.model.dit.replay import Replay
from longtake.model.parts import PARTS, ROUNDED, build, parts_of, ready
from longtake.model.refiner import Refiner, RefinerStream, adapters
from longtake.model.residency import stream_blocks
from longtake.model.samplers.chunk_flow import chunk_flow_euler, chunk_noise
from longtake.model.samplers.flow_euler import clip_noise, euler, sampler_sigmas, trajectory_sigmas
from longtake.model.stream import ChunkStream
from longtake.model.vae import decode_latents, decode_parts, encode_frames

Residency = Literal["all", "stages", "blocks"]
_BY_BLOCKS = {"refiner", "refiner_text"}  # too large for small devices
_OF_REFINER = 1 << 16  # where noise of stage 1 has the number of a step
ImageInput = Image.Image | str | Path | np.ndarray


class WorldPipeline:
    """A loaded world model. Parts that were not asked for are None; a step that needs one raises ValueError.

    Latents are normalised, float32, (B, C, T, h, w) with T = (frames - 1) / vae_stride[0] + 1. Seeds: one a clip; a
    clip's result depends on its own seed alone, not on its neighbours in the batch.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        modules: dict[str, nn.Module],
        device: str | torch.device = "cpu",
        residency: Residency = "all",
    ):
        if residency not in (known := get_args(Residency)):
            raise ValueError(f"residency {residency!r} must be one of {', '.join(known)}")
        self.config, self.residency = config, residency
        self.device = torch.device(device)
        self.settled: set[Hashable] = set()  # kinds of videos for which all is compiled, tuned and captured
        self.modules = {name: module.eval().requires_grad_(False) for name, module in modules.items()}
        if residency == "all":
            for module in self.modules.values():
                module.to(self.device)
            if isinstance(refiner := self.modules.get("refiner"), Refiner):
                refiner.replay_rounded()
        elif residency == "blocks":
            for name in _BY_BLOCKS & self.modules.keys():
                stream_blocks(self.modules[name], self.device)

    @classmethod
    def from_config(
        cls, config: WorldModelConfig, seed: int = 0, device: str | torch.device = "cpu", parts: Sequence[str] = PARTS
    ) -> WorldPipeline:
        """Random weights: for tests, and for measuring the full size without its checkpoint."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, {part: build(part, config) for part in parts}, device)

    @classmethod
    def from_pretrained(
        cls,
        preset: str = "tiny",
        weights_path: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: Sequence[str] | None = None,
        residency: Residency = "all",
        quantization: float8.Quantization | None = None,
    ) -> WorldPipeline:
        """Load `parts` of a preset (all by default) from a folder or `hf://owner/name`; None is the folder shipped with
        the preset. The refiner's adapters are merged into it where they lie beside it.

        residency: what is on the device: all parts; or one at a time, the others in the host's memory; or the same with
        the blocks of the refiner and its text encoder one after another, for devices that do not hold these whole.
        quantization: "fp8" rounds what the large matrix products of both stages take, see `float8`; what is loaded so
        cannot be saved.
        ValueError before any tensor is read when the folder is missing or holds another preset.
        """
        config = presets.get(preset)
        folder = weights.resolve(config, weights_path)
        config = weights.config_for(config, folder)
        parts = parts_of(config) if parts is None else parts
        if ROUNDED & set(parts):
            float8.check(quantization, device)
        modules = {part: build(part, config, folder) for part in parts}
        for part, module in modules.items():
            if part in weights.FOLDERS and not (part == "text" and config.text.kind == "gemma"):
                weights.load_part(module, folder, part)
            if part == "refiner":
                adapters.merge_beside(module.get_submodule("transformer").state_dict(), folder)
            modules[part] = ready(module, dtype, quantization)
        return cls(config, modules, device, residency)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write every loaded part and the configuration. ValueError for what was quantized."""
        if any(isinstance(layer, float8.Float8Linear) for part in self.modules.values() for layer in part.modules()):
            raise ValueError("weights that were rounded to float8 are not saved: load them without quantization")
        for part, module in self.modules.items():
            weights.save_part(module, Path(folder), part, dtype)
        weights.save_config(self.config, Path(folder))

    def part(self, name: str) -> nn.Module:
        """A loaded part, on the device. ValueError when it was not loaded."""
        if name not in self.modules:
            raise ValueError(f"this pipeline was loaded without {name!r}: add it to `parts`")
        if self.residency != "all":
            self._bring(name)
        return self.modules[name]

    def _bring(self, name: str) -> None:
        """Put a part on the device, and all others into the host's memory."""
        stay = _BY_BLOCKS if self.residency == "blocks" else set()
        for other, module in self.modules.items():
            if other not in stay:
                module.to(self.device if other == name else "cpu")
        if name != "dit":
            self.__dict__.pop("replay", None)  # what was captured reads weights where they were

    def release(self, *names: str) -> None:
        """Give up parts, and the memory that they take."""
        for name in names:
            self.modules.pop(name, None)

    def prepare_image(self, image: ImageInput) -> np.ndarray:
        """Resize and centre-crop to config.image_size: uint8 (H, W, 3). ValueError when it cannot be read as an
        image.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"an image array must be uint8 (H, W, 3), this one is {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            try:
                with Image.open(image) as opened:
                    image = ImageOps.exif_transpose(opened).convert("RGB")
            except FileNotFoundError:
                raise ValueError(f"there is no image at {image}") from None
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"{image} cannot be read as an image: {error}") from None
        height, width = self.config.image_size
        return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))

    @torch.no_grad()
    def encode_image(self, image: ImageInput) -> Tensor:
        """The first latent frame, (1, C, 1, h, w)."""
        return self.encode_video(self.prepare_image(image)[None])

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray | Tensor) -> Tensor:
        """Latents (1, C, T, h, w) of uint8 frames (F, H, W, 3), F = 8 k + 1."""
        return encode_frames(self.part("vae"), torch.as_tensor(np.array(frames), device=self.device)[None])  # type: ignore[arg-type]

    @torch.no_grad()
    def encode_text(self, captions: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) and mask (B, L), of stage 1."""
        return self.part("text").encode(captions, negative)  # type: ignore[operator]

    @torch.no_grad()
    def encode_refiner_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) and mask (B, L), of stage 2."""
        if not self.config.refiner_reads_own_text:
            return self.encode_text(captions)
        return self.part("refiner_text").encode(captions)  # type: ignore[operator]

    @torch.no_grad()
    def rollout(
        self,
        image_latents: Tensor,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None,
        seeds: Sequence[int],
        num_steps: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        num_latent_frames: int | None = None,
        negative: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Stage 1: latents (B, C, T, h, w) that begin with `image_latents` (B, C, 1, h, w) and follow `camera`.

        T comes from the camera, or from num_latent_frames when there is none. negative: features and mask of the
        negative prompt, needed when the preset's guidance_scale is not 1. progress(step, steps) is called after each
        step, or, of a chunk-causal model, after each chunk.
        """
        if self.config.chunk_causal:
            chunks = self.stream(
                image_latents, text, text_mask, camera, seeds, num_steps, progress, num_latent_frames, negative
            )
            return torch.cat(list(chunks), 2)
        frames = self._latent_frames(camera, num_latent_frames, negative)
        start, velocity = self._denoising(image_latents, text, text_mask, camera, seeds, frames, negative)
        latents = euler(velocity, start, sampler_sigmas(self.config.sampler, num_steps), 1, progress)
        return _finite(latents, frames)

    @torch.no_grad()
    def trajectory(
        self,
        image_latents: Tensor,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures,
        seeds: Sequence[int],
        timesteps: Sequence[float],
        num_steps: int | None = None,
        negative: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What `rollout` passes on its way: the latents at each of the falling `timesteps`, and last the clean ones,
        (B, len(timesteps) + 1, C, T, h, w). Where its own steps do not, they stop there as well.
        """
        if self.config.chunk_causal:
            raise ValueError(f"the weights of {self.config.name!r} make one chunk after another: choose a stage before")
        frames = self._latent_frames(camera, None, negative)
        x, velocity = self._denoising(image_latents, text, text_mask, camera, seeds, frames, negative)
        passed = [x]
        sigmas = sampler_sigmas(self.config.sampler, num_steps)
        for run in trajectory_sigmas(sigmas, [timestep / 1000 for timestep in timesteps]):
            passed.append(euler(velocity, passed[-1], run, 1))
        return _finite(torch.stack(passed, 1), frames)

    def _denoising(
        self,
        image_latents: Tensor,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None,
        seeds: Sequence[int],
        frames: int,
        negative: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Noise after the image, and the velocity (x, timestep) of what it becomes."""
        model: Any = self.part("dit")
        guidance = self.config.sampler.guidance_scale
        camera = None if camera is None else camera.to(self.device)
        _, channels, _, height, width = image_latents.shape
        grid = frames, height, width
        context = model.context(grid, text, text_mask, camera, of_sample=True)
        without = None
        if negative is not None and guidance != 1:
            without = model.context(grid, *negative, camera, of_sample=True)

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            conditional = self.replay.velocity(x, timestep, context)
            if without is None:
                return conditional
            unconditional = self.replay.velocity(x, timestep, without)
            return unconditional + guidance * (conditional - unconditional)

        start = clip_noise((channels, frames, height, width), seeds, self.device)
        start[:, :, :1] = image_latents
        return start, velocity

    def stream(
        self,
        image_latents: Tensor,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None,
        seeds: Sequence[int],
        num_steps: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        num_latent_frames: int | None = None,
        negative: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """What `rollout` makes, chunk by chunk, (B, C, t, h, w) each, in memory that does not grow with T where the
        model's window is bounded. A video's first chunks do not depend on its length, if it is a whole number of
        chunks longer and its chunks are made one after another. What is given is read again for the chunk that
        follows: do not change it in place.
        """
        config = self.config
        if not config.chunk_causal:
            raise ValueError(f"the weights of {config.name!r} see the whole clip at once: stream chunk-causal ones")
        frames = self._latent_frames(camera, num_latent_frames, negative)
        sigmas = sampler_sigmas(config.sampler, num_steps).tolist()
        model: Any = self.part("dit")
        camera = None if camera is None else camera.to(self.device)
        negative = None if config.sampler.guidance_scale == 1 else negative
        network = ChunkStream(model, text, text_mask, camera, negative, self.replay)
        sizes = chunk_sizes(frames, config.chunk_size)

        def noise(chunk: int, length: int, step: int = 0) -> Tensor:
            shape = image_latents.shape[1], length, *image_latents.shape[3:]
            return chunk_noise(shape, seeds, chunk, self.device, step)

        fresh, interval = noise if config.sampler.fresh_noise else None, config.sampler.chunk_interval
        chunks = chunk_flow_euler(network, noise, sizes, sigmas, interval, image_latents, fresh)
        for number, latents in enumerate(chunks, 1):
            if progress:
                progress(number, len(sizes))
            yield _finite(latents, network.state.frames + latents.shape[2])

    def _latent_frames(self, camera: CameraFeatures | None, count: int | None, negative: tuple | None) -> int:
        """Of a rollout. ValueError for arguments that do not make one."""
        frames = count if camera is None else camera.conditions.shape[1]
        if frames is None:
            raise ValueError("give a camera, or num_latent_frames for a video without one")
        most = self.config.most_latent_frames
        if most is not None and frames > most:
            raise ValueError(f"{frames} latent frames are more than the {most} positions of this model")
        if self.config.sampler.guidance_scale != 1 and negative is None:
            raise ValueError(
                f"guidance_scale {self.config.sampler.guidance_scale} needs the features of a negative prompt"
            )
        return frames

    def generate(
        self,
        images: Sequence[ImageInput],
        captions: list[str],
        trajectories: Sequence[Trajectory],
        seeds: Sequence[int],
        num_steps: int | None = None,
        follow_camera: bool = True,
    ) -> Tensor:
        """Stage 1 from what a user has: latents (B, C, T, h, w) of trajectories of one length.

        follow_camera=False leaves the camera out of the model, but for the length.
        """
        config = self.config
        camera = CameraFeatures.cat([path.features(config.image_size, config.vae_stride) for path in trajectories])
        start = torch.cat([self.encode_image(image) for image in images])
        return self.rollout(
            start,
            *self.encode_text(captions),
            camera if follow_camera else None,
            seeds,
            num_steps,
            num_latent_frames=camera.conditions.shape[1],
            negative=self.negatives(len(captions)),
        )

    def negatives(self, count: int) -> tuple[Tensor, Tensor] | None:
        """`negative` of so many clips."""
        negative = self.negative
        return negative and (negative[0].expand(count, -1, -1), negative[1].expand(count, -1))

    @cached_property
    def replay(self) -> Replay:
        """Of the stage-1 network."""
        return Replay(self.part("dit"))  # type: ignore[arg-type]

    @cached_property
    def negative(self) -> tuple[Tensor, Tensor] | None:
        """Features and mask of one negative prompt, where the preset uses guidance."""
        return self.encode_text([""], negative=True) if self.config.sampler.guidance_scale != 1 else None

    def refine(self, latents: Tensor, text: Tensor, text_mask: Tensor, seeds: Sequence[int]) -> Tensor:
        """Stage 2: refined latents of the same shape; the first latent frame is kept."""
        if self.config.refiner.block_size is not None:
            return torch.cat(list(self.refine_chunks([latents], text, text_mask, seeds)), 2)
        refiner: Any = self.part("refiner")
        return refiner.refine(latents, self._refiner_noise(latents.shape, seeds), text, text_mask)

    def refine_chunks(
        self, chunks: Iterable[Tensor], text: Tensor, text_mask: Tensor, seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        """What `refine` makes of a video's latents, as they come, (B, C, t, h, w) each: first the first latent frame,
        then the refiner's blocks. Memory does not grow with the video. ValueError for a refiner of whole clips.
        """
        return self.refining(text, text_mask, seeds)(chunks)

    def refining(
        self, text: Tensor, text_mask: Tensor, seeds: Sequence[int], known: Sequence[Tensor] = ()
    ) -> RefinerStream:
        """What takes a video's latents and gives refined ones. known: of its blocks the first, as they were refined
        before. ValueError for a refiner of whole clips.
        """
        if self.config.refiner.block_size is None:
            raise ValueError(f"the refiner of {self.config.name!r} sees the whole clip: give it one, with `refine`")

        def noise(number: int, block: Tensor) -> Tensor:
            return self._refiner_noise(block.shape, seeds, number)

        return RefinerStream(self.part("refiner"), text, text_mask, noise, known=known)  # type: ignore[arg-type]

    def _refiner_noise(self, shape: Sequence[int], seeds: Sequence[int], block: int = 0) -> Tensor:
        """Other noise than stage 1 draws from the same seeds."""
        return chunk_noise(shape[1:], seeds, block, self.device, _OF_REFINER)

    def decode(self, latents: Tensor) -> np.ndarray:
        """All frames of one clip (1, C, T, h, w): uint8 (F, H, W, 3)."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(self, latents: Tensor) -> Iterator[np.ndarray]:
        """The frames of one clip as they are decoded, uint8 (f, H, W, 3) each; memory does not grow with the length."""
        for frames in decode_latents(self.part("vae"), latents):  # type: ignore[arg-type]
            yield frames[0].cpu().numpy()

    @property
    def decodes_chunks(self) -> bool:
        """Whether frames can be decoded before later latents are known."""
        return bool(self.config.vae.get("decoder_causal", True))

    def decode_stream(self, parts: Iterable[Tensor]) -> Iterator[np.ndarray]:
        """The frames of one clip whose latents come in parts (1, C, t, h, w), uint8 (f, H, W, 3) each. ValueError for a
        decoder that sees later frames.
        """
        for frames in decode_parts(self.part("vae"), parts):  # type: ignore[arg-type]
            yield frames[0].cpu().numpy()


def _finite(latents: Tensor, frames: int) -> Tensor:
    if not torch.isfinite(latents).all():
        raise ValueError(f"these weights diverge over {frames} latent frames: ask for a shorter video")
    return latents


def check_folder(config: WorldModelConfig, folder: Path, parts: Sequence[str] | None = None) -> dict[str, int]:
    """How many tensors each of `parts` (default: those that are there) has in a weights folder, by sub-folder.

    Only the files' headers are read. ValueError naming the first tensor that is missing, extra or of another shape than
    `config` makes it. Gemma, which transformers loads by itself, is left out.
    """
    own = [part for part in PARTS if not (part == "text" and config.text.kind == "gemma")]
    found = [part for part in own if part in (parts or own) and (parts or (folder / weights.FOLDERS[part]).is_dir())]
    if not found:
        wanted = ", ".join(f"{weights.FOLDERS[part]}/" for part in own)
        raise ValueError(f"{folder} is not a weights folder: it holds none of {wanted}")
    with torch.device("meta"):
        modules = WorldPipeline.from_config(config, device="meta", parts=found).modules
    loaded = {part: weights.load_part(module, folder, part) for part, module in modules.items()}
    if "refiner" in loaded:
        adapters.merge_beside(loaded["refiner"].get_submodule("transformer").state_dict(), folder)
    return {weights.FOLDERS[part]: len(module.state_dict()) for part, module in loaded.items()}

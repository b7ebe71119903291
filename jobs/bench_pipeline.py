"""Time whole videos from image to frames, with random weights: streamed, whole, and on small cards.

streaming: chunks of few steps through refiner and decoder, a minute beside the time it takes. bidirectional: all steps
of a whole clip, of which --steps are timed and the others counted, then refiner and decoder. blocks: the refiner's
blocks pass through the device one after another. serving: a chunk in a decoder of its own, and what
a video keeps there and in a refiner. Texts are random features: encoders run once a video, then go. Figures go to
docs/measurements/pipeline_DEVICE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtake.model import presets, weights
from longtake.model.camera import Trajectory, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.float8 import QUANTIZATIONS
from longtake.model.parts import parts_of
from longtake.model.pipeline import Residency, WorldPipeline
from longtake.model.random_weights import random_pipeline
from longtake.model.refiner.refiner import SINK
from longtake.model.vae import decode_more
from longtake.model.video import make_video
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.timing import milliseconds, now
from longtake.platform.store.fragments import encode_fragment

_MODES = ("streaming", "bidirectional", "blocks", "serving")
_CPU = torch.device("cpu")
_GPUS = 8  # of the published videos an hour


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    if args.seconds <= 0 or args.steps < 1:
        raise ValueError("--seconds must be more than 0, and --steps at least 1")
    if args.name:
        measurements.check_name(args.name)
    whole, few = presets.get(args.preset), presets.get(f"{args.preset}-streaming")
    few = dataclasses.replace(few, refiner=dataclasses.replace(few.refiner, block_size=few.refiner.block_size or 3))
    if args.dry_run:
        print(json.dumps(vars(args) | {"streaming": dataclasses.asdict(few)}, indent=2))
        return
    figures: dict[str, float] = {}
    for mode in args.modes:
        bench = Bench(whole if mode == "bidirectional" else few, torch.device(args.device), args)
        found = getattr(bench, mode)()
        for name, figure in found.items():
            print(f"{name:32} {figure:.4g}", flush=True)
        figures |= found
        del bench
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if args.write:
        print(f"figures: {measurements.write(args.name or f'pipeline_{args.device}', figures)}")


class Bench:
    """One model with random weights, a black image and a walk."""

    def __init__(self, config: WorldModelConfig, device: torch.device, args: argparse.Namespace) -> None:
        self.config, self.device, self.args = config, device, args
        self.image = np.zeros((*config.image_size, 3), np.uint8)

    def pipeline(self, *parts: str, residency: Residency = "all") -> WorldPipeline:
        """With these parts and those that read texts."""
        texts = (part for part in parts_of(self.config) if "text" in part)
        return random_pipeline(self.config, (*parts, *texts), self.device, residency, self.args.quantization)

    def path(self, seconds: float) -> Trajectory:
        config = self.config
        chunk = config.frames_per_chunk
        frames = max(1, round(seconds * config.fps / chunk)) * chunk
        return parse_actions(f"w-{frames}", fps=config.fps, image_size=config.image_size)

    def streaming(self) -> dict[str, float]:
        """A video of --seconds after a shorter one that fills the windows, and so compiles and chooses."""
        pipeline = self.pipeline("vae", "dit", "refiner")
        texts = {name: pipeline.part(name) for name in pipeline.modules if "text" in name}

        def run(seconds: float) -> tuple[float, float]:
            """Seconds until the first frames, and until the last."""
            pipeline.modules |= texts  # which the video before gave up
            begin, first = now(self.device), None
            for _ in make_video(pipeline, self.image, "", self.path(seconds)):
                first = first or now(self.device) - begin
            return first or 0.0, now(self.device) - begin

        run(min(self.args.seconds, 9.0))
        measurements.forget_peak()
        first, seconds = run(self.args.seconds)
        length = self.path(self.args.seconds).duration
        return {"streaming_x_realtime": length / seconds, "first_frames_s": first, "peak_gb": self._peak()}

    @torch.no_grad()
    def bidirectional(self) -> dict[str, float]:
        """The sum that a video takes, part by part, and what all parts together hold."""
        pipeline = self.pipeline("vae", "dit", "refiner")
        path, steps = self.path(self.args.seconds), self.config.sampler.num_steps
        camera = path.features(self.config.image_size, self.config.vae_stride)
        text, own = pipeline.encode_text([""]), pipeline.encode_refiner_text([""])
        start = pipeline.encode_image(self.image)
        negative = pipeline.encode_text([""], negative=True)
        measurements.forget_peak()

        def denoise(count: int) -> Tensor:
            return pipeline.rollout(start, *text, camera, [0], count, negative=negative)

        denoise(1)
        latents, timed = self._timed(lambda: denoise(self.args.steps))
        pipeline.refine(latents[:, :, :2], *own, [0])
        refined, refine = self._timed(lambda: pipeline.refine(latents, *own, [0]))
        _, decode = self._timed(lambda: sum(len(frames) for frames in pipeline.decode_chunks(refined)))
        denoising = timed / self.args.steps * steps
        return {
            "bidirectional_step_s": timed / self.args.steps,
            "bidirectional_denoise_s": denoising,
            "bidirectional_refine_s": refine,
            "bidirectional_decode_s": decode,
            "bidirectional_peak_gb": self._peak(),
            f"videos_per_hour_{_GPUS}": _GPUS * 3600 / (denoising + refine + decode),
        }

    def blocks(self) -> dict[str, float]:
        """A refiner whose blocks pass through the device, over a video that fills its window once."""
        pipeline = self.pipeline("refiner", residency="blocks")
        frames = 1 + 2 * (self.config.refiner.block_size or 3)
        latents = torch.randn(1, self.config.latent_channels, frames, *self.config.latent_size, device=self.device)
        own = pipeline.encode_refiner_text([""])
        pipeline.refine(latents[:, :, :4], *own, [0])
        measurements.forget_peak()
        _, seconds = self._timed(lambda: pipeline.refine(latents, *own, [0]))
        return {"block_residency_block_s": seconds / 2, "block_residency_peak_gb": self._peak()}

    def serving(self) -> dict[str, float]:
        """What sizes a stage that has a process of its own: seconds a chunk, memory, and what it keeps of a video."""
        return self._decoder() | self._refiner_past()

    @torch.no_grad()
    def _decoder(self) -> dict[str, float]:
        vae: Any = self.pipeline("vae").part("vae")
        latents, walk, past = self._chunk(), self._walk(), {}
        for _ in range(3):
            _, past = decode_more(vae, latents, past)
        measurements.forget_peak()
        return {
            "decode_chunk_s": milliseconds(lambda: decode_more(vae, latents, past), self.device) / 1e3,
            "decoder_peak_gb": self._peak(),
            "decoder_past_gb": sum(tensor.nbytes for tensor in past.values()) / 1e9,
            "fragment_s": milliseconds(lambda: encode_fragment(walk, self.config.fps, 0, 0), _CPU) / 1e3,
        }

    @torch.no_grad()
    def _refiner_past(self) -> dict[str, float]:
        pipeline = self.pipeline("refiner")
        stream = pipeline.refining(*pipeline.encode_refiner_text([""]), seeds=[0])
        while stream.past.length < self.config.refiner.window - SINK:
            list(stream.take(self._chunk()))
        return {"refiner_past_gb": stream.past.nbytes / 1e9}

    def _chunk(self) -> Tensor:
        """Latents of one chunk, or of one block of the refiner."""
        return torch.randn(1, self.config.latent_channels, 3, *self.config.latent_size, device=self.device)

    def _walk(self) -> np.ndarray:
        """Frames of a chunk: a start image of tiny's that moves sideways by four pixels a frame."""
        height, width = self.config.image_size
        still = np.asarray(Image.open(weights.SHIPPED / "tiny" / "images" / "hall.png").resize((width, height)))
        return np.stack([np.roll(still, 4 * frame, 1) for frame in range(self.config.frames_per_chunk)])

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        begin = now(self.device)
        made = work()
        return made, now(self.device) - begin

    def _peak(self) -> float:
        return measurements.peak_memory() / 1e9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--preset", default="sana-wm", choices=("tiny", "sana-wm"), help="and its streaming form (default: %(default)s)"
    )
    add("--modes", nargs="+", default=list(_MODES), choices=_MODES, help="default: all")
    add("--seconds", type=float, default=60.0, help="of the videos (default: %(default)s)")
    add("--steps", type=int, default=2, help="of the bidirectional sampler that are timed (default: %(default)s)")
    add("--quantization", choices=QUANTIZATIONS, help="round what large matrix products take")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    add("--name", help="of the file in docs/measurements (default: pipeline_DEVICE)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

"""Time a video made chunk by chunk, from its first minute to its tenth, and many videos at once.

Random weights of the few-step model, denoising alone: no autoencoder. A chunk is its steps and the pass that keeps it.
Of a minute, nobody waits for its chunks; chunks timed one by one are waited for.
Figures go to docs/measurements/stream_DEVICE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longtake.model import presets
from longtake.model.camera import CameraFeatures, parse_actions, random_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.replay import Replay
from longtake.model.dit.world_model import WorldModel
from longtake.model.float8 import QUANTIZATIONS, Quantization, check
from longtake.model.parts import ready
from longtake.model.samplers.flow_euler import euler, sampler_sigmas
from longtake.model.stream import ChunkStream
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.observe.timing import now
from longtake.platform.train import stages
from longtake.platform.train.run import configured

_OF_A_MINUTE = 121  # latent frames
_UNTIL_STEADY = 4  # chunks


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = configured(presets.get(args.preset), stages.get("stage4_distill", args.preset))
    if args.depth:
        config = dataclasses.replace(config, depth=args.depth)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    check(args.quantization, args.device)
    if min(args.minutes, args.sessions) < 1 or args.chunks_a_minute < 2:
        raise ValueError("--minutes and --sessions must be at least 1, --chunks-a-minute at least 2")
    if args.name:
        measurements.check_name(args.name)
    if args.dry_run:
        print(json.dumps(vars(args) | {"config": dataclasses.asdict(config)}, indent=2))
        return
    device = torch.device(args.device)
    figures = Streams(config, device, args.quantization).measure(args.minutes, args.chunks_a_minute, args.sessions)
    for name, figure in figures.items():
        print(f"{name:32} {figure:.4g}")
    if args.write:
        print(f"figures: {measurements.write(args.name or f'stream_{args.device}', figures)}")


class Streams:
    """Videos of one network with random weights: texts and noise are random, cameras walk."""

    def __init__(
        self, config: WorldModelConfig, device: torch.device, quantization: Quantization | None = None
    ) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            model = WorldModel(config).eval().requires_grad_(False)
        self.model = ready(model, dtype, quantization)
        self.dtype, self.size, self.replay = dtype, config.chunk_size, Replay(self.model)
        self.cameras = [self.camera(seed) for seed in range(8)]

    def stream(self, replayed: bool = True) -> ChunkStream:
        text = torch.randn(1, self.config.text.length, self.config.text_dim, device=self.device, dtype=self.dtype)
        mask = torch.ones(1, self.config.text.length, device=self.device)
        return ChunkStream(self.model, text, mask, replay=self.replay if replayed else None)

    def camera(self, seed: int) -> CameraFeatures:
        """Of a chunk that is not the first."""
        stride, size = self.config.vae_stride, self.config.image_size
        path = parse_actions(random_actions(stride[0] * self.size, seed), fps=self.config.fps, image_size=size)
        return path.features(size, stride).frames(1, self.size + 1).to(self.device)

    def chunk(self, streams: Sequence[ChunkStream], camera: CameraFeatures) -> ChunkStream:
        """The next chunk of all of them, in one batch, without what they were before."""
        one = ChunkStream.together(streams, camera)
        first = not streams[0].state.frames
        shape = len(streams), self.config.latent_channels, self.size, *self.config.latent_size
        noise, sizes = torch.randn(shape, device=self.device), [self.size]

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            return one.velocity(x, timestep, sizes)

        one.keep(euler(velocity, noise, sampler_sigmas(self.config.sampler), 1 if first else 0), sizes)
        return one

    def run(self, chunks: int, replayed: bool = True) -> Iterator[ChunkStream]:
        """A new video: its stream after each chunk."""
        stream = self.stream(replayed)
        for number in range(chunks):
            stream = self.chunk([stream], self.cameras[number % len(self.cameras)])
            yield stream

    def timed(self, chunks: Iterator[ChunkStream]) -> Iterator[tuple[ChunkStream, float]]:
        """After each chunk, the milliseconds it took."""
        begin = now(self.device)
        for stream in chunks:
            yield stream, 1e3 * (now(self.device) - begin)
            begin = now(self.device)

    def measure(self, minutes: int, chunks_a_minute: int, sessions: int) -> dict[str, float]:
        # The first chunk with all that is compiled and captured, and the others that are unlike later ones.
        first, *_ = [milliseconds for _, milliseconds in self.timed(self.run(_UNTIL_STEADY))]
        begin = now(self.device)
        for _ in self.run(chunks_a_minute):
            pass
        minute = now(self.device) - begin
        times, peaks, stream = [], [], self.stream()
        with Progress(minutes * chunks_a_minute, "chunks", "stream") as progress:
            for stream, milliseconds in self.timed(self.run(minutes * chunks_a_minute)):  # noqa: B007  # used later
                times.append(milliseconds)
                progress.update(1)
                if len(times) % chunks_a_minute == 0:
                    peaks.append(measurements.peak_memory() / 1e9)
        of_minute = [times[n * chunks_a_minute : (n + 1) * chunks_a_minute] for n in range(minutes)]
        steady = times[len(times) // 20 + 1 :]
        plain = [milliseconds for _, milliseconds in self.timed(self.run(2 * _UNTIL_STEADY, replayed=False))]
        alone, together = (self.batches(stream, count, sessions // count) for count in (1, sessions))
        return {
            "first_chunk_s": first / 1e3,
            "first_chunk_warm_s": times[0] / 1e3,
            "minute_s": minute * _OF_A_MINUTE / (chunks_a_minute * self.size),
            "chunk_ms_first_minute": statistics.median(of_minute[0]),
            f"chunk_ms_{'tenth' if minutes == 10 else 'last'}_minute": statistics.median(of_minute[-1]),
            "slope_ms_per_chunk": float(np.polyfit(np.arange(len(steady)), steady, 1)[0]),
            "chunk_ms_without_replay": statistics.median(plain[_UNTIL_STEADY:]),
            "session_mb": stream.state.nbytes / 1e6,
            "peak_gb_first_minute": peaks[0],
            "peak_gb": peaks[-1],
            f"sessions{sessions}_over_serial": together / alone,
            f"sessions{sessions}_ms": together,
        }

    def batches(self, stream: ChunkStream, size: int, count: int) -> float:
        """Milliseconds of the next chunk of so many batches of sessions, after one that may tune what it runs."""
        camera = self.cameras[0].expand(size)
        begin = 0.0
        for number in range(1 + count):
            if number < 2:
                begin = now(self.device)
            self.chunk([stream] * size, camera)
        return 1e3 * (now(self.device) - begin)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench-stream", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--depth", type=int, default=0, help="blocks (default: as many as the preset has)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quantization", choices=QUANTIZATIONS, help="round what large matrix products take")
    add("--minutes", type=int, default=10, help="how long the video gets (default: %(default)s)")
    add("--chunks-a-minute", type=int, default=40, help="40 are a minute: fewer measure less of it")
    add("--sessions", type=int, default=8, help="videos at once (default: %(default)s)")
    add("--name", help="of the figures (default: stream_DEVICE)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

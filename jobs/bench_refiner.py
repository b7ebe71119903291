"""Time the refiner beside diffusers' implementation of it, block by block, with the same weights.

Figures go to docs/measurements/refiner_DEVICE: seconds a block, means over a video; of a full window; memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch

from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.model.float8 import QUANTIZATIONS, Quantization, check, quantize
from longtake.model.refiner import RefinerStream
from longtake.model.refiner.parity import Pair, relative_error
from longtake.model.refiner.refiner import SINK, block_sizes
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.timing import milliseconds, now


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    spec = dataclasses.replace(config.refiner, block_size=config.refiner.block_size or 3)
    if args.layers:
        spec = dataclasses.replace(spec, num_layers=args.layers)
    config = dataclasses.replace(config, refiner=spec)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    if args.frames < SINK + config.refiner.window:
        raise ValueError(f"--frames {args.frames} never fill the window: give at least {SINK + config.refiner.window}")
    check(args.quantization, args.device)
    if args.name:
        measurements.check_name(args.name)
    if args.dry_run:
        print(json.dumps(vars(args) | {"refiner": dataclasses.asdict(config.refiner)}, indent=2))
        return
    figures = measure(config, torch.device(args.device), args.frames, args.text, args.quantization)
    for name, figure in figures.items():
        print(f"{name:24} {figure:.4g}")
    if args.write:
        print(f"figures: {measurements.write(args.name or f'refiner_{args.device}', figures)}")


def measure(
    config: WorldModelConfig, device: torch.device, frames: int, text: int, quantization: Quantization | None = None
) -> dict[str, float]:
    """Seconds a block of a video of so many latent frames, beside so many tokens of text: ours, diffusers', and ours
    quantized.
    """
    torch.manual_seed(0)
    given: dict[str, Any] = dict(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    pair = Pair(
        config,
        torch.randn(1, config.latent_channels, frames, *config.latent_size, **given),
        torch.randn(1, text, config.refiner.text_dim, **given),
        torch.ones(1, text, device=device),
    )
    assert config.refiner.block_size is not None
    blocks = len(block_sizes(frames - SINK, config.refiner.block_size))
    pair.theirs(SINK + config.refiner.block_size)
    expected, seconds, peak = _timed(lambda: pair.theirs(frames), device)
    figures = {"block_peer_s": seconds / blocks, "peer_peak_gb": peak}

    def ours(suffix: str) -> dict[str, float]:
        pair.ours(frames)  # compiles, and tries which attention is the fastest
        found, seconds, peak = _timed(lambda: pair.ours(frames), device)
        return {
            f"block{suffix}_s": seconds / blocks,
            f"full_window_block{suffix}_s": _full_window(pair, device),
            f"peak{suffix}_gb": peak,
            f"ratio{suffix}": figures["block_peer_s"] * blocks / seconds,
            f"relative_difference{suffix}": relative_error(found, expected),
        }

    figures |= ours("")
    if quantization is not None:
        quantize(pair.refiner)
        pair.refiner.replay_rounded()
        figures |= ours(f"_{quantization}")
    return figures


def _full_window(pair: Pair, device: torch.device) -> float:
    """Seconds of a block that sees as much as any."""
    size = pair.config.refiner.block_size or 1
    stream = RefinerStream(pair.refiner, pair.text, pair.mask)
    latents = pair.latents.float()
    stream.begin(latents[:, :, :SINK])
    block = latents[:, :, SINK : SINK + size]
    while stream.past.length < pair.config.refiner.window - SINK:
        stream.refine(block, torch.randn_like(block))
    past = stream.past

    def again() -> None:
        stream.past = past
        stream.refine(block, block)

    return milliseconds(again, device) / 1e3


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float, float]:
    """What it makes, in how many seconds, and the most memory that was held, in 1e9 bytes."""
    measurements.forget_peak()
    begin = now(device)
    made = work()
    return made, now(device) - begin, measurements.peak_memory() / 1e9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench-refiner", description=__doc__)
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--frames", type=int, default=43, help="latent frames of the video (default: %(default)s)")
    add("--text", type=int, default=1024, help="tokens of text (default: %(default)s)")
    add("--layers", type=int, help="of the network, in place of all")
    add("--quantization", choices=QUANTIZATIONS, help="time ours once more so: its weights beside both others'")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    add("--name", help="of the file in docs/measurements (default: refiner_DEVICE)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

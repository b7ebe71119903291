"""Put coarse versions beside encoded clips, as stage 1 makes them: what the refiner learns from."""

from __future__ import annotations

import argparse
import json

from longtake.model import presets, weights
from longtake.platform.data.latents import LatentStore
from longtake.platform.distill.pairs import Coarse, make_pairs
from longtake.platform.distill.trajectories import find_stage1
from longtake.platform.observe.job import run_job


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    preset = presets.get(args.preset)
    if min(args.batch, args.actors_per_gpu, args.num_steps) < 1:
        raise ValueError("--batch, --actors-per-gpu and --num-steps must be at least 1")
    sigmas = tuple(args.sigmas)
    if not all(0 < sigma < 1 for sigma in sigmas):
        raise ValueError(f"--sigmas {sigmas} must be between 0 and 1")
    if not 0 <= args.synthetic <= 1:
        raise ValueError(f"--synthetic {args.synthetic} is a share: it must be from 0 to 1")
    config, folder = preset, ""
    if args.synthetic < 1:
        found = find_stage1(preset, args.weights)
        config, folder = weights.config_for(preset, found), str(found)
    if args.dry_run:
        print(json.dumps(vars(args) | {"weights": folder}, indent=2))
        return
    coarse = Coarse(config, folder, sigmas, args.num_steps, args.synthetic, args.seed, args.batch)
    make_pairs(coarse, args.data, args.pairs, args.actors_per_gpu)
    print(f"{len(LatentStore(args.pairs))} clips, {len(sigmas)} versions each, in {args.pairs}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make-pairs", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--data", required=True, help="store of latents")
    add("--pairs", required=True, help="store to write: folder or s3://bucket/prefix")
    add("--weights", help="run or weights folder of stage 1 (default: those shipped)")
    add(
        "--sigmas",
        type=float,
        nargs="+",
        default=[0.6, 0.7, 0.8, 0.9],
        help="how far clips are noised before stage 1 denoises them, a version each (default: 0.6 0.7 0.8 0.9)",
    )
    add("--num-steps", type=int, default=4, help="of stage 1 (default: %(default)s)")
    add("--synthetic", type=float, default=0.0, help="share of versions blurred without stage 1 (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--batch", type=int, default=4, help="clips made together (default: %(default)s)")
    add("--actors-per-gpu", type=int, default=1)
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

"""Keep a model's many-step ways from noise to clips, for stage4-ode to learn; run it again to resume."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longtake.model import presets, weights
from longtake.platform.data.latents import LatentStore
from longtake.platform.distill.trajectories import Teacher, find_teacher, make_trajectories
from longtake.platform.observe.job import run_job
from longtake.platform.train import stages
from longtake.platform.train.run import configured


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    preset = presets.get(args.preset)
    folder = find_teacher(preset, args.weights)
    few = configured(preset, stages.get("stage4_ode", args.preset)).sampler.timesteps[:-1]
    timesteps = tuple(args.timesteps or few)
    if min(args.batch, args.actors_per_gpu, args.num_steps or 1) < 1:
        raise ValueError("--batch, --actors-per-gpu and --num-steps must be at least 1")
    falling = all(high > low > 0 for high, low in zip(timesteps, timesteps[1:], strict=False))
    if not falling or timesteps[0] != 1000:
        raise ValueError(f"--timesteps {timesteps} must fall from 1000, and stay above 0")
    if args.dry_run:
        print(json.dumps(vars(args) | {"weights": str(folder), "timesteps": timesteps}, indent=2))
        return
    config = weights.config_for(preset, Path(folder))
    teacher = Teacher(config, str(folder), timesteps, args.num_steps, args.seed, args.batch)
    make_trajectories(teacher, args.data, args.trajectories, args.actors_per_gpu)
    print(f"{len(LatentStore(args.trajectories))} trajectories in {args.trajectories}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make-trajectories", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--data", required=True, help="store of latents, whose first frames, captions and cameras are used")
    add("--trajectories", required=True, help="store to write: folder or s3://bucket/prefix")
    add("--weights", help="run or weights folder of the model, one that sees whole clips (default: those shipped)")
    add("--num-steps", type=int, help="of the model (default: its own)")
    add("--timesteps", type=float, nargs="+", help="where the latents are kept (default: those of stage4-ode)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--batch", type=int, default=4, help="clips rolled out together (default: %(default)s)")
    add("--actors-per-gpu", type=int, default=1)
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

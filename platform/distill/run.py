"""From a command line to a distilled model: the last stage, and all that it builds on where that is not given."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

from longtake.model import presets, weights
from longtake.model.config import WorldModelConfig
from longtake.platform.data.latents import LatentStore
from longtake.platform.distill.starts import write_starts
from longtake.platform.distill.trajectories import Teacher, find_teacher, make_trajectories
from longtake.platform.observe.notices import say
from longtake.platform.store.files import refuse_url
from longtake.platform.train import stages
from longtake.platform.train.run import configured, resolve, stage_parser, train_stage
from longtake.platform.train.stages import Stage

_NAME, _FIRST = "stage4_distill", "stage4_ode"
_MINUTES, _BATCH = 12.0, 4  # where nobody says what to learn from: a laptop's
_FIRST_SHARE = 0.4  # of the minutes


def distil(argv: list[str] | None = None, about: str | None = None) -> None:
    """Train the last stage as the arguments say. Run again, it goes on where it was.

    Without --init it makes what it starts from: RUN/trajectories, what the teacher makes of the clips in --data, or of
    the start images beside its weights; and RUN/ode, a run of stage4_ode on these that begins with the teacher's
    weights. ValueError for whatever can be known to be wrong before.
    """
    args = _parser(about).parse_args(argv)
    preset = presets.get(args.preset)
    stage = stages.override(stages.get(_NAME, args.preset), args.set)
    config = configured(preset, stage)
    teacher = find_teacher(preset, args.teacher)
    args.set.append(f"options.teacher={str(teacher)!r}")
    if not args.init:
        _learn_first(args, stage, config, teacher)
    elif not args.data:
        raise ValueError("--init goes on from a run: say with --data from which clips, or leave --init out")
    if args.init:
        train_stage(resolve(_NAME, args), args)


def _learn_first(args: argparse.Namespace, stage: Stage, config: WorldModelConfig, teacher: Path) -> None:
    """Make the clips and the weights that the stage starts from, and name them in `args`."""
    refuse_url("--run", args.run)
    if len(args.data) > 1:
        raise ValueError("without --init, --data is one store: make-trajectories turns each into one that can be mixed")
    if args.starts < 1:
        raise ValueError(f"--starts {args.starts} must be at least 1")
    smaller = []
    if not args.data:
        smaller = [f"batch_size={min(_BATCH, stage.batch_size)}", "log_every=5"]
        if args.max_minutes is None and args.steps is None:
            args.max_minutes = _MINUTES
            say(f"{_MINUTES:.0f} minutes on rollouts of {teacher}'s start images; see --data and --max-minutes")
    starts, trajectories = args.data or [f"{args.run}/starts"], [f"{args.run}/trajectories"]
    first = copy.copy(args)
    first.run, first.data, first.init = f"{args.run}/ode", trajectories, [str(teacher)]
    first.steps, args.set = args.ode_steps, smaller + args.set
    first.set = [*smaller, f"frames={stage.frames}", f"seed={stage.seed}"]
    if args.max_minutes is not None:
        first.max_minutes = _FIRST_SHARE * args.max_minutes
        args.max_minutes -= first.max_minutes
    lesson = resolve(_FIRST, first)
    if args.dry_run:
        print(json.dumps({"first": dataclasses.asdict(lesson), "then": dataclasses.asdict(stage)}, indent=2))
        return
    if not args.data:
        write_starts(LatentStore(starts[0]), args.preset, teacher, [teacher / "images"], args.starts, stage.frames)
    asked = Teacher(weights.config_for(presets.get(args.preset), teacher), str(teacher), config.sampler.timesteps[:-1])
    make_trajectories(asked, starts[0], trajectories[0])
    train_stage(lesson, first)
    args.data, args.init = trajectories, [first.run]


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = stage_parser(_NAME, about, needs_data=False)
    add = parser.add_argument
    add("--teacher", metavar="FOLDER", help="run or weights of the many-step model (default: the preset's own)")
    add("--starts", type=int, default=16, help="rollouts of start images to learn from without --data (default: 16)")
    add("--ode-steps", type=int, help="the most steps of the run of stage4-ode without --init")
    return parser

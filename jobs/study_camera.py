"""Train the world model with none, one or both of its camera branches, and compare what they follow.

Every kind has the same latents, seed and number of steps, from random weights, with the preset's softmax blocks: a run
of stage 1, one a GPU at once. Then `evaluate-worlds` measures it on a store of fans. Figures go to
docs/measurements/ablation_PRESET; run again, it goes on where it was cut short. Runs that were trained elsewhere, by
the commands that --dry-run prints, are measured with --trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import torch

from longtake.model import presets, weights
from longtake.model.config import CameraBranches
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.identification import fans
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.store.files import refuse_url
from longtake.platform.train import log

KINDS = get_args(CameraBranches)
_MEASURES = {
    "identification": "identification_{ways}way",
    "rotation_error_deg": "rotation_error_deg",
    "translation_error_m": "translation_error_m",
}


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    autoencoder = weights.resolve(config, args.weights) / weights.FOLDERS["vae"]
    refuse_url("--runs", args.runs)
    if args.steps < 1 or args.starts < 1:
        raise ValueError("--steps and --starts must be at least 1")
    ways = len(next(iter(fans(ClipStore(args.store).keys()).values())))
    plans = {kind: (_training(args, config.softmax_every, kind), _evaluation(args, kind)) for kind in KINDS}
    if args.dry_run:
        print(json.dumps(plans, indent=2))
        return
    if args.trained:
        _check_trained(args)
    gpus = torch.cuda.device_count()

    def studied(number: int) -> dict[str, float]:
        kind = KINDS[number]
        train, evaluate = plans[kind]
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=str(number % gpus)) if gpus else dict(os.environ)
        environment.pop("RAY_ADDRESS", None)
        if not args.trained:
            _run(train, environment)
        into = args.runs / kind / "weights" / autoencoder.name
        shutil.copytree(autoencoder, into, dirs_exist_ok=True)
        measured, _ = json.JSONDecoder().raw_decode(_run(evaluate, environment))
        print(f"{kind}: {measured}", flush=True)
        return {f"{name}_{kind}": measured[key.format(ways=ways)] for name, key in _MEASURES.items()}

    figures: dict[str, float] = {"steps": args.steps, "starts": args.starts}
    with ThreadPoolExecutor(max(1, gpus)) as pool:
        for found in pool.map(studied, range(len(KINDS))):
            figures |= found
    print(f"{'':10}" + "".join(f"{name:>22}" for name in _MEASURES))
    for kind in KINDS:
        print(f"{kind:10}" + "".join(f"{figures[f'{name}_{kind}']:22.3f}" for name in _MEASURES))
    if args.write:
        print(f"figures: {measurements.write(f'ablation_{config.name}'.replace('-', '_'), figures)}")


def _training(args: argparse.Namespace, softmax_every: int, kind: str) -> list[str]:
    chosen = [f"model.camera_branches={kind}", f"model.softmax_every={softmax_every}", *args.set]
    command = ["stage1-gdn", "--preset", args.preset, "--data", args.data, "--run", str(args.runs / kind)]
    return [*command, "--steps", str(args.steps), *(f"--set={value}" for value in chosen)]


def _evaluation(args: argparse.Namespace, kind: str) -> list[str]:
    command = ["evaluate-worlds", "--preset", args.preset, "--weights", str(args.runs / kind / "weights")]
    measured = ["--store", args.store, "--starts", str(args.starts), "--limit", "0", "--long", "0"]
    return [*command, *measured, "--only-with-camera", "--out", str(args.runs / kind / "videos"), "--no-write"]


def _check_trained(args: argparse.Namespace) -> None:
    """ValueError unless every kind's run has made all its steps and left weights."""
    for kind in KINDS:
        folder, records = args.runs / kind, log.read(args.runs / kind)
        steps = records[-1]["step"] if records else 0
        if steps != args.steps or not (folder / "weights").is_dir():
            raise ValueError(f"--trained: {folder} needs weights and metrics of {args.steps} steps: it has {steps}")


def _run(command: list[str], environment: dict[str, str]) -> str:
    """What the job printed, run in a process of its own. ValueError with its last words when it fails."""
    longtake = [sys.executable, "-c", "from longtake.platform.cli import main; main()"]
    done = subprocess.run([*longtake, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study-camera", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--data", required=True, help="latent store: folder or s3://bucket/prefix")
    add("--store", required=True, help="clip store of fans: folder or s3://bucket/prefix")
    add("--weights", help="whose autoencoder made the latents; by default the weights shipped with the preset")
    add("--runs", type=Path, default=Path("runs/study_camera"), help="folder of the runs (default: %(default)s)")
    add("--steps", type=int, default=3000, help="of each run (default: %(default)s)")
    add("--starts", type=int, default=64, help="that each is measured on (default: %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field of the stage")
    add("--trained", action="store_true", help="only measure runs that have made all their steps")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the commands that would be run")
    return parser


if __name__ == "__main__":
    run_job(main)

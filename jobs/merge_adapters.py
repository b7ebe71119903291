"""Merge a refiner's trained adapters into their base, or onto another one, and check what came out.

The published recipe trains adapters on a base of many steps and merges them onto the same network distilled to few:
--onto FOLDER --other-base.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from longtake.model import presets, weights
from longtake.model.checkpoint import local_folder
from longtake.model.pipeline import check_folder
from longtake.model.refiner import adapters, merging
from longtake.platform.observe.job import run_job
from longtake.platform.store.files import refuse_url

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    refuse_url("--out", args.out)
    preset = presets.get(args.preset)
    source = _weights(args.adapters)
    base = _weights(args.onto) if args.onto else source
    if (args.out / weights.FOLDERS["refiner"]).exists():
        raise ValueError(f"{args.out} has a refiner already: name another --out, or take it away")
    config = weights.config_for(preset, base)
    found = adapters.read(source)
    place = base / weights.FOLDERS["refiner"]
    if not place.is_dir():
        raise ValueError(f"{base} has no refiner/ to merge into: give the folder that holds it with --onto")
    check_folder(config, base, ["refiner"])
    digest = weights.digest(place)
    if not args.other_base:
        adapters.check_base(found, digest, str(place))
    if args.dry_run:
        print(json.dumps(vars(args) | {"base": digest, "trained_on": found.base}, indent=2, default=str))
        return
    merging.write(base, found, args.out, _DTYPES[args.dtype])
    weights.save_config(config, args.out)
    error = merging.check(config, base, found, args.out)
    print(f"{len(found.matrices)} layers merged into {args.out}: differs from base and adapters apart by {error:.1e}")


def _weights(given: str) -> Path:
    """The weights folder of a run, or the folder itself."""
    folder = local_folder(given)
    return folder / "weights" if (folder / "weights").is_dir() else folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge-adapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--adapters", required=True, help="run of stage5-refiner, or folder of adapters, peft's or diffusers'")
    add("--onto", metavar="FOLDER", help="weights whose refiner/ they are merged into (default: that beside them)")
    add("--other-base", action="store_true", help="although they were not trained on it")
    add("--out", type=Path, required=True, help="weights folder to write the merged refiner/ into")
    add("--dtype", default="bfloat16", choices=list(_DTYPES), help="of what is written (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

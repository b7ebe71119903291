"""Gather runs and weights folders into one weights folder, in 32, 16 or 8 bits.

Of each part, the last --init that has it wins. Adapters of a refiner are merged into it. In int8 each row of a matrix
has a scale, and what loads it computes in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from longtake.model import presets, weights
from longtake.model.checkpoint import load_safetensors, save_safetensors
from longtake.model.pipeline import check_folder
from longtake.model.refiner import adapters
from longtake.platform.observe.job import run_job
from longtake.platform.store.files import refuse_url
from longtake.platform.train.run import find_parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    refuse_url("--out", args.out)
    preset = presets.get(args.preset)
    found = {
        part: Path(folder) for part, folder in find_parts(args.init).items() if not args.parts or part in args.parts
    }
    if missing := set(args.parts or []) - set(found):
        raise ValueError(f"none of --init has {weights.FOLDERS[missing.pop()]}/")
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} is a weights folder already: name another --out, or take it away")
    source = presets.get(args.source or args.preset)
    configs = {part: weights.config_for(source, place) for part, place in found.items()}
    own = {part: getattr(configs[part], part) for part in ("vae", "text", "refiner") if part in found}
    config = dataclasses.replace(configs.get("dit", next(iter(configs.values()))), name=preset.name, **own)
    for part, place in found.items():
        check_folder(config, place, [part])
    if args.dry_run:
        print(json.dumps(vars(args) | {"parts": found}, indent=2, default=str))
        return
    for part, place in found.items():
        target = args.out / weights.FOLDERS[part]
        target.mkdir(parents=True, exist_ok=True)
        tensors = load_safetensors(place / weights.FOLDERS[part])
        if part == "refiner":
            adapters.merge_beside(tensors, place)
        save_safetensors(tensors, target / "model.safetensors", _DTYPES[args.dtype])
    weights.save_config(config, args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{', '.join(weights.FOLDERS[part] for part in found)}: {size / 1e6:.1f} MB in {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export-weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--preset",
        default="tiny",
        help=f"that the folder is to be of: {', '.join(presets.names())} (default: %(default)s)",
    )
    add("--source", help="preset that the weights were trained as (default: the same)")
    add("--init", nargs="+", required=True, help="runs and weights folders")
    add("--parts", nargs="+", choices=list(weights.FOLDERS), help="of these alone (default: all that are there)")
    add("--out", type=Path, required=True, help="weights folder to write")
    add("--dtype", default="float16", choices=list(_DTYPES))
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

"""Compare both stages' networks with diffusers' implementations of them, with the same weights.

Before that it accounts for every tensor of the official file, at full size and without allocating any; with --weights
also for every tensor of a weights folder. One process on CPUs; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import difflib
import json

from longtake.model import presets, weights
from longtake.model.parity import CASES, LIMIT, Case, account_for_official, relative_error
from longtake.model.pipeline import check_folder
from longtake.model.refiner.parity import REFINER_CASES, RefinerCase
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress

_ALL: tuple[Case | RefinerCase, ...] = (*CASES, *REFINER_CASES)


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    cases = chosen(args.cases)
    folder = weights.resolve(config, args.weights) if args.weights else None
    if folder is not None:
        config = weights.config_for(config, folder)
    if args.dry_run:
        print(json.dumps(vars(args) | {"cases": [case.name for case in cases], "limit": LIMIT}, indent=2))
        return
    figures: dict[str, float] = dict(account_for_official())
    print(f"official file: {figures['official_tensors']} tensors, all accounted for")
    if folder is not None:
        for part, tensors in check_folder(config, folder).items():
            print(f"{folder / part}: {tensors} tensors, those of preset {config.name}")
    errors = compare(cases)
    figures |= {f"relative_error_{name}": error for name, error in errors.items()}
    if above := [name for name, error in errors.items() if not error <= LIMIT]:
        raise ValueError(
            f"{len(above)} of {len(errors)} cases differ by more than {LIMIT:g} ({', '.join(above)}): compare the "
            "installed torch and diffusers with requirements.lock"
        )
    if args.write and len(cases) == len(_ALL):
        print(f"figures: {measurements.write('parity', figures)}")


def chosen(names: list[str] | None) -> list[Case | RefinerCase]:
    """The cases of those names, or all. ValueError for an unknown name."""
    known = {case.name: case for case in _ALL}
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"no case is called {name!r}: {hint}")
    return [known[name] for name in names or known]


def compare(cases: list[Case | RefinerCase]) -> dict[str, float]:
    """The relative error of each case by its name, printed as a table."""
    errors: dict[str, float] = {}
    with Progress(len(cases), "cases", "parity") as progress:
        for case in cases:
            errors[case.name] = case.relative_error() if isinstance(case, RefinerCase) else relative_error(case)
            progress.update(1, largest=max(errors.values()))
    for name, error in errors.items():
        print(f"{name:28} {error:.1e}")
    return errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check-parity", description=__doc__)
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"of --weights, one of {', '.join(presets.names())} (default: %(default)s)")
    add("--weights", help="also compare the tensors of this folder or hf://owner/name with the preset")
    add("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(case.name for case in _ALL)} (default: all)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements (all cases alone are)")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

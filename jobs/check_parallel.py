"""Compare a clip that several processes share with the same clip on one, and count what they send.

Processes on this machine, over gloo on CPUs or NCCL on GPUs; random weights, nothing is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import chunk_sizes
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.parallel.compare import LIMIT, Layout, compare
from longtake.platform.parallel.context import AttentionExchange
from longtake.platform.parallel.traffic import Traffic


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    if args.depth:
        config = dataclasses.replace(config, depth=args.depth)
    exchanges: list[AttentionExchange] = args.attention or (["heads"] if config.chunk_causal else ["heads", "ring"])
    layouts = [_layout(text, attention, config) for text in args.layouts for attention in exchanges]
    if args.device == "cuda" and (needed := max(layout.ranks for layout in layouts)) > torch.cuda.device_count():
        raise ValueError(f"{needed} ranks need a GPU each, this machine has {torch.cuda.device_count()}")
    if args.dry_run:
        print(json.dumps(vars(args) | {"config": dataclasses.asdict(config), "limit": LIMIT}, indent=2))
        return
    errors: dict[str, float] = {}
    traffic: list[tuple[str, Traffic]] = []
    with Progress(len(layouts), "layouts", "parallel") as progress:
        for layout in layouts:
            found = compare(config, layout, args.device)
            errors |= {f"worst_{what}_error_{layout.name}": error for what, error in found.errors.items()}
            traffic += [(layout.name, sent) for sent in found.traffic]
            progress.update(1, largest=max(errors.values()))
    for name, error in errors.items():
        print(f"{name:40} {error:.1e}")
    print(f"\n{'bytes that a block sends forwards':50} {'counted':>12} {'by the maths':>12}")
    for name, sent in traffic:
        print(f"{f'{sent.what} of {sent.kind}, rank {sent.rank} of {name}':50} {sent.counted:12,} {sent.expected:12,}")
    if above := [name for name, error in errors.items() if not error <= LIMIT]:
        raise ValueError(f"{', '.join(above)}: more than {LIMIT:g}; compare torch with requirements.lock")
    if wrong := [name for name, sent in traffic if sent.counted != sent.expected]:
        raise ValueError(f"{', '.join(dict.fromkeys(wrong))}: sends other bytes than platform/parallel/traffic.py says")
    sizes: dict[str, float] = {}
    for name, sent in traffic:
        figure = f"most_{sent.kind}_{sent.what}_bytes_{name}"
        sizes[figure] = max(sizes.get(figure, 0), sent.counted)
    if args.write:
        print(f"figures: {measurements.write(f'context_parallel_{args.device}', errors | sizes)}")


def _layout(text: str, attention: AttentionExchange, config: WorldModelConfig) -> Layout:
    """RANKSxFRAMES. ValueError when it is none, or a rank would hold no frame, or no chunk."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--layouts {text}: write RANKSxFRAMES, such as 2x7")
    layout = Layout(int(numbers[0]), int(numbers[1]), attention)
    if not 1 <= layout.ranks <= layout.frames:
        raise ValueError(f"--layouts {text}: a rank needs a frame, so at least 1 and at most {layout.frames} ranks")
    if config.chunk_causal and attention == "ring":
        raise ValueError("--attention ring: a chunk-causal model's ranks exchange heads; leave it out")
    if config.chunk_causal and layout.ranks > (most := len(chunk_sizes(layout.frames, config.chunk_size))):
        raise ValueError(f"--layouts {text}: a rank needs a chunk of preset {config.name!r}, so at most {most} ranks")
    return layout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check-parallel", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--depth", type=int, default=4, help="blocks; 0 for as many as the preset has (default: %(default)s)")
    add(
        "--layouts",
        nargs="+",
        default=["2x7", "3x5", "4x5", "2x121"],
        metavar="RANKSxFRAMES",
        help="processes and latent frames (default: 2x7 3x5 4x5 2x121)",
    )
    add(
        "--attention",
        nargs="+",
        choices=["heads", "ring"],
        help="how processes share softmax attention (default: heads ring; of a chunk-causal preset: heads)",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

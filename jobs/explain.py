"""Say which implementation of each operator runs here, and why.

On a GPU the softmax attention of a clip is timed by every backend that can compute it.
"""

from __future__ import annotations

import argparse
import json

import torch

from longtake.kernels.attention import choose
from longtake.kernels.launch import reason
from longtake.model import presets
from longtake.platform.observe.job import run_job


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    if args.frames < 1:
        raise ValueError(f"--frames {args.frames}: latent frames of a clip, at least 1")
    if args.dry_run:
        print(json.dumps(vars(args), indent=2))
        return
    print(f"gdn, encoding, convolutions   {reason()}")
    if not torch.cuda.is_available():
        print("softmax attention             torch's own choice: without a GPU there is one")
        return
    rows, columns = config.latent_size
    shape = (1, args.frames * rows * columns, config.num_heads, config.head_dim)
    for training in (False, True):
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=training) for _ in range(3))
        choice = choose(q, k, v, config.head_dim**-0.5)
        times = ", ".join(f"{name} {time:.1f} ms" for name, time in sorted(choice.milliseconds.items()))
        what = "training" if training else "inference"
        print(f"softmax attention, {what:11}{choice.backend}: {times} at {args.frames} latent frames")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="explain", description=__doc__)
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--frames", type=int, default=121, help="latent frames of a clip (default: %(default)s, a minute)")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

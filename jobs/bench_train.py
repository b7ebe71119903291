"""Time a stage's training steps over any number of workers, on random latents.

As a run would take them, through Ray Train and DeepSpeed, but nothing is saved. A layout is WORKERSxSHARINGxFRAMES: so
many processes, one a GPU, of which so many share a clip of so many latent frames, one clip at a time. What one worker
does comes before what it is compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections import Counter
from typing import NamedTuple

from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.parallel.traffic import Shared, account
from longtake.platform.train import log, run, stages
from longtake.platform.train.settings import Settings
from longtake.platform.train.stages import Stage

_WARM_UP = 2  # steps that compile, and try which attention is the fastest


class Layout(NamedTuple):
    workers: int
    sharing: int
    frames: int

    @property
    def name(self) -> str:
        copies = self.workers // self.sharing
        return f"T{self.frames}_cp{self.sharing}" + (f"_dp{copies}" if copies > 1 else "")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.steps <= _WARM_UP:
        raise ValueError(f"--steps {args.steps} must be more than {_WARM_UP}, which warm up")
    if args.name:
        measurements.check_name(args.name)
    config = presets.get(args.preset)
    layouts = [_layout(text) for text in args.layouts]
    chosen = [_stage(args, config, layout) for layout in layouts]
    config = run.configured(config, chosen[0])
    if args.dry_run:
        print(json.dumps([dataclasses.asdict(stage) for stage in chosen], indent=2))
        return
    figures: dict[str, float] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (layout, stage) in enumerate(zip(layouts, chosen, strict=True)):
            store = LatentStore(f"{folder}/latents{number}")
            versions = 2 if stage.options.get("pairs") else 0
            write_random(store, config, stage.frames, max(2, stage.batch_size), versions)
            settings = Settings(stage, config, ((store.uri, 1.0),), f"{folder}/{number}", {}, layout.workers)
            run.launch(settings, losses=0, keep=False)
            sent, errors = _traffic(settings, layout)
            wrong += errors
            found = _speed(settings, layout) | sent
            alone = figures.get(f"tokens_per_s_{Layout(1, 1, layout.frames).name}")
            if alone and layout.workers > 1:
                found[f"efficiency_{layout.name}"] = found[f"tokens_per_s_{layout.name}"] / alone
            for name, figure in found.items():
                print(f"{name:50} {figure:.4g}", flush=True)
            figures |= found
    if wrong:
        raise ValueError("\n".join(wrong))
    if args.name:
        print(f"figures: {measurements.write(args.name, figures)}")


def _layout(text: str) -> Layout:
    """WORKERSxSHARINGxFRAMES. ValueError when it is none."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"--layouts {text}: write WORKERSxSHARINGxFRAMES, such as 2x2x121")
    layout = Layout(*map(int, numbers))
    if layout.workers % layout.sharing or layout.sharing > layout.frames:
        raise ValueError(
            f"--layouts {text}: the workers must be a multiple of those that share a clip, which need a frame each"
        )
    return layout


def _stage(args: argparse.Namespace, config: WorldModelConfig, layout: Layout) -> Stage:
    """The table's stage at this size. ValueError for one that random latents are not enough for."""
    stage = stages.override(stages.get(args.stage, args.preset), args.set)
    if stage.objective not in ("flow", "distill", "refiner"):
        raise ValueError(
            f"--stage {args.stage} needs more than random latents: choose stage1_gdn, stage2_hybrid, stage3_minute, "
            "stage4_causal, stage4_distill or stage5_refiner"
        )
    frames = 1 + config.vae_stride[0] * (layout.frames - 1)
    sizes = dict(frames=frames, window=min(stage.window, frames), batch_size=layout.workers // layout.sharing)
    zero = {} if layout.workers > 1 or stage.offload else dict(zero_stage=0)  # nothing to share out
    return dataclasses.replace(
        stage,
        **dict(sizes, micro_batch_size=1, context_parallel=layout.sharing, steps=args.steps, init_from=(), **zero),
        **dict(log_every=1, checkpoint_minutes=0.0, checkpoint_steps=0, cache=None, warmup=0),
    )


def _speed(settings: Settings, layout: Layout) -> dict[str, float]:
    """Of the steps after the first ones."""
    records = log.read(settings.folder)[_WARM_UP:]
    seconds = statistics.median(settings.stage.batch_size / record["clips_per_second"] for record in records)
    figures = {
        f"step_s_{layout.name}": seconds,
        f"tokens_per_s_{layout.name}": statistics.median(record["tokens_per_second"] for record in records),
        f"peak_gb_{layout.name}": records[-1]["memory_gib"] * 1.024**3,
        f"data_wait_{layout.name}": statistics.mean(record["data_wait"] for record in records),
    }
    if "mfu" in records[-1]:
        figures[f"mfu_{layout.name}"] = statistics.median(record["mfu"] for record in records)
    return figures


def _traffic(settings: Settings, layout: Layout) -> tuple[dict[str, float], list[str]]:
    """The most bytes that a rank sends in the forward pass of a block, and where the maths says otherwise."""
    config, exchange = settings.config, settings.stage.attention_exchange
    figures: dict[str, float] = {}
    wrong: list[str] = []
    for rank in range(layout.workers if layout.sharing > 1 else 0):
        noted = json.loads((settings.folder / f"sent_{rank}.json").read_text())
        shared = Shared(layout.frames, layout.sharing, exchange, 1, math.prod(config.latent_size), noted["itemsize"])
        totals: Counter[str] = Counter()
        for sent in dict.fromkeys(account(config, shared, rank % layout.sharing, noted["sent"])):
            totals[f"bytes_per_layer_{sent.kind}_{layout.name}"] += sent.counted
            if sent.counted != sent.expected:
                where = f"{layout.name}: {sent.what} of {sent.kind} blocks, rank {rank}"
                wrong.append(f"{where}: {sent.counted} bytes, by platform/parallel/traffic.py {sent.expected}")
        figures |= {name: max(total, figures.get(name, 0)) for name, total in totals.items()}
    return figures, wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench-train", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--stage", default="stage3_minute", help="that trains on latents (default: %(default)s)")
    add(
        "--layouts",
        nargs="+",
        default=["1x1x11", "2x2x11"],
        metavar="WORKERSxSHARINGxFRAMES",
        help="processes, how many of them share a clip, its latent frames (default: 1x1x11 2x2x11)",
    )
    add("--steps", type=int, default=6, help=f"of each layout, {_WARM_UP} of them to warm up (default: %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field of the stage")
    add("--name", help="write the figures to docs/measurements/NAME.json")
    add("--dry-run", action="store_true", help="print the resolved stages")
    return parser


if __name__ == "__main__":
    run_job(main)

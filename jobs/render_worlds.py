"""Render camera-posed clips of game maps and rooms into a store, in parallel; run it again to resume."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from longtake.platform.data.render import vizdoom_worlds
from longtake.platform.data.render.preview import preview_folder, write_preview
from longtake.platform.data.render.shards import Shard, places, plan, render
from longtake.platform.data.store import ClipStore
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    split = "test" if args.fan else args.split
    clips = args.clips if args.clips is not None else 512 if args.fan else 64
    shards = plan(places(args.source, split, args.maps), clips, args.frames, args.seed, args.fan)
    clips = sum(shard.num_clips for shard in shards)  # of fans, whole ones
    if args.dry_run:
        print(
            json.dumps({**vars(args), "split": split, "clips": clips, "shards": [asdict(s) for s in shards]}, indent=1)
        )
        return
    store = ClipStore(args.store)
    if args.preview:
        preview_folder(store)  # refuses a bucket before hours of rendering
    present = _present(store, shards)
    left = [shard for shard in shards if shard.name not in present]
    done = sum(shard.num_clips for shard in shards) - sum(shard.num_clips for shard in left)
    if left:
        _render_all(args.store, left, args.workers, Progress(clips, label="render", initial=done))
    if not store.shards():
        raise ValueError(f"no place had room and light for {args.frames} frames: give other --maps or another --seed")
    print(f"{len(store)} clips in {store.uri}")
    if args.preview:
        for path in write_preview(store, shards):
            print(path)


def _render_all(uri: str, shards: Sequence[Shard], workers: int, progress: Progress) -> None:
    without = 0
    with progress:
        for stored, failed in _in_parallel(uri, shards, workers):
            without += failed
            progress.update(stored, **({"without a start": without} if without else {}))


def _in_parallel(uri: str, shards: Sequence[Shard], workers: int) -> Iterator[tuple[int, int]]:
    """(stored, failed) of each shard as it ends; at most `workers` at a time."""
    if workers == 1:
        yield from (render(shard, ClipStore(uri)) for shard in shards)
        return
    from longtake.platform.observe import ray_cluster

    ray_cluster.connect(num_cpus=workers)
    import ray

    task = ray.remote(num_cpus=1, max_calls=8)(_task)  # a fresh process now and then: engines leave threads behind
    waiting, running = list(shards), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(task.remote(uri, waiting.pop(0)))
        ended, running = ray.wait(running)
        yield from ray.get(ended)


def _task(uri: str, shard: Shard) -> tuple[int, int]:
    return render(shard, ClipStore(uri))


def _present(store: ClipStore, shards: Sequence[Shard]) -> set[str]:
    """Shards that need no rendering. ValueError when the store holds the same clips under another division."""
    present, names, groups = set(store.shards()), {shard.name for shard in shards}, {shard.group for shard in shards}
    for name in sorted(present - names):
        if any(name.startswith(group) for group in groups):
            raise ValueError(
                f"{store.uri} holds {name}, of another number of clips: give a new --seed or another --store"
            )
    return present


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="render-worlds", description=__doc__)
    add = parser.add_argument
    add("--store", required=True, help="folder or s3://bucket/prefix")
    add("--source", choices=("vizdoom", "mujoco", "both"), default="vizdoom")
    add("--clips", type=int, help="how many in all (64; with --fan 512)")
    add("--frames", type=int, default=81, help="frames a clip at 16 a second: 81 are 5 s, 961 a minute")
    add("--split", choices=("train", "test", "both"), default="both")
    add("--seed", type=int, default=0)
    add(
        "--maps",
        nargs="*",
        default=[],
        metavar="MAP",
        help=f"such as {vizdoom_worlds.MAPS[0]}; default: all of the split",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; 1 renders in this one")
    add("--fan", action="store_true", help="eight trajectories from each start, on the test maps")
    add("--preview", action="store_true", help="also draw a sheet of frames and one of trajectories beside the store")
    add("--dry-run", action="store_true", help="print what would be rendered")
    return parser


if __name__ == "__main__":
    run_job(main)

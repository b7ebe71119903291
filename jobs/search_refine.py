"""Roll out many videos from images, score them, refine the best; leaves videos, a table and a page.

Run again with the same --out it continues: what is finished is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import ray
import torch

import longtake
from longtake.model import presets, weights
from longtake.model.camera import KEY_MAPS, Steering, Trajectory, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.float8 import QUANTIZATIONS, check
from longtake.model.pipeline import WorldPipeline, check_folder
from longtake.platform.observe import measurements, ray_cluster
from longtake.platform.observe.job import run_job
from longtake.platform.search.actors import Generator, ModelSpec, RefineWriter, start_pool
from longtake.platform.search.plan import (
    ACTIONS,
    Candidate,
    StartImage,
    fingerprint,
    load_images,
    long_actions,
    make_candidate,
    make_plan,
    make_tree,
    read_trajectory,
)
from longtake.platform.search.run import STEPS, Search
from longtake.platform.search.selection import NAMES, Rule, parse_weights
from longtake.platform.search.timing import time_tree
from longtake.platform.search.tree import check_tree
from longtake.platform.store.dataset import KINDS, write_dataset
from longtake.platform.store.files import refuse_url
from longtake.platform.store.run_folder import RunFolder


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    config, folder = model_of(args)
    trajectories = trajectories_of(args, config)
    frame = WorldPipeline(config, {})
    if not args.images and not (folder / "images").is_dir():
        raise ValueError(f"{folder} ships no images/: give some with --images")
    images = load_images(args.images or [folder / "images"], frame.prepare_image, args.prompt, args.licence)
    model = f"{config.name} {fingerprint(folder)} {config.sampler} {args.num_steps} {config.refiner}"
    model += f" {args.quantization}" if args.quantization else ""
    seeds = range(args.seed, args.seed + args.seeds)
    if args.tree:
        paths = functools.partial(walk, args, config)
        candidates = make_tree(images, list(trajectories), args.tree, paths, seeds, model)
        check_length(
            "of the tree", max((each.trajectory for each in candidates), key=lambda each: each.num_frames), config
        )
    else:
        candidates = make_plan(images, trajectories, seeds, model)
    check(args.quantization, "cuda" if torch.cuda.is_available() else "cpu")
    if args.dry_run:
        print(json.dumps(resolved(args, config, folder, candidates), indent=2))
        return
    if args.measure_tree:
        measure_tree(args, config, folder, candidates)
        return
    started = time.monotonic()
    run = RunFolder(args.out)
    steps = (args.step,) if args.step else STEPS
    started_pools = functools.cache(lambda: pools(args, config, folder))
    about = {"model": config.name, "weights": fingerprint(folder), "longtake": longtake.__version__}
    about |= {"generator": "longtake search-refine", "num_steps": args.num_steps or config.sampler.num_steps}
    about |= {"quantization": args.quantization} if args.quantization else {}
    rule, budget = Rule(args.top_k, parse_weights(args.score)), args.budget or math.inf
    search = Search(candidates, run, rule, about, args.batch_size, steps, budget)
    there = search.total - search.pending
    search.execute(started_pools)
    print(f"{search.made} videos made or refined in {time.monotonic() - started:.0f} s, {there} were there already")
    if args.long and "refine" in steps and search.chosen:
        chosen = long_candidate(args, config, search.best().image, model)
        last = Search([chosen], run, rule, about, budget=budget, note=search.note())
        last.execute(started_pools, label=f"{args.long:.0f} s video")
        if args.measure and run.refined(chosen.key):
            measure(run, chosen, config)
    if args.dataset and "refine" in steps:
        print(f"data set: {write_dataset(run.path / 'results.parquet', args.dataset).resolve()}")
    if "select" in steps:
        print(f"selection: {len(search.chosen)} of {len(search.records)} scored candidates")
    if note := search.note():
        print(note)
    print(f"page: {(run.path / 'index.html').resolve()}")
    run.close()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="search-refine", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())}")
    add("--weights", help="folder or hf://owner/name; by default those shipped with the preset")
    add("--images", type=Path, nargs="+", help="images or folders of images; by default those shipped with the weights")
    add("--prompt", help="caption of every image; by default the text file beside each")
    add("--licence", help="of the images; by default the first line of licence.txt beside them")
    add("--actions", action="append", help=f"keys and frames, repeatable; by default {' '.join(ACTIONS)}")
    add("--trajectory", type=Path, action="append", help="poses c2w (F, 4, 4) as .npy, or a saved .npz; repeatable")
    add(
        "--tree",
        type=int,
        default=0,
        metavar="DEPTH",
        help="try every sequence of so many --actions, whole chunks each",
    )
    add("--key-map", default="official", choices=KEY_MAPS)
    add("--translation-speed", type=float, help="metres a second; by default the key map's")
    add("--rotation-speed", type=float, help="degrees a second; by default the key map's")
    add("--fov", type=float, default=75.0, help="horizontal field of view in degrees")
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=int, default=1, help="seeds for each image and trajectory")
    add("--top-k", type=int, default=1, help="videos refined for each image")
    add("--step", choices=STEPS, help="one step alone; by default all of them. The long video belongs to refine")
    weights_now = " ".join(f"{name}={weight:g}" for name, weight in parse_weights(None).items())
    add("--score", action="append", metavar="NAME=WEIGHT", help=f"of {', '.join(NAMES)}; by default {weights_now}")
    add("--budget", type=float, metavar="SECONDS", help="of rollouts, over all generators and runs; then none begins")
    add("--long", type=float, default=60.0, help="seconds of one long video from the best image; 0 for none")
    add("--long-actions", help="keys and frames of the long video; by default a walk")
    add("--num-steps", type=int, help="sampling steps; by default the preset's")
    add("--quantization", choices=QUANTIZATIONS, help="round what large matrix products take; off by default")
    add("--batch-size", type=int, default=1, help="candidates rolled out together")
    add("--generators", type=int, default=1, help="actors of stage 1")
    add("--refiners", type=int, default=1, help="actors of stage 2")
    add("--gpus-per-actor", type=float, help="by default the cluster's GPUs are shared out evenly")
    add("--out", type=Path, default=Path("runs/search"))
    add("--dataset", choices=KINDS, help="write the selected videos as such shards as well, in OUT/dataset")
    add("--measure", action="store_true", help="write docs/measurements/PRESET_DEVICE.json from the long video")
    add("--measure-tree", action="store_true", help="time one tree beside its leaves one by one, and end")
    add("--dry-run", action="store_true", help="print what would be done as JSON")
    args = parser.parse_args(argv)
    for name in ("seeds", "top_k", "batch_size", "generators", "refiners"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    parse_weights(args.score)
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget must be more than 0 seconds, not {args.budget}")
    if args.tree < 0:
        raise ValueError(f"--tree must be a number of levels, or 0 for no tree, not {args.tree}")
    if args.tree and not args.actions:
        raise ValueError("--tree needs its branches: give some --actions, whole chunks each, such as --actions w-24")
    if args.tree and (args.trajectory or args.num_steps):
        raise ValueError("--tree takes --actions and the preset's steps: leave out --trajectory and --num-steps")
    if args.measure_tree and not args.tree:
        raise ValueError("--measure-tree needs a tree: give --tree 3 and some --actions")
    if args.measure and not args.long:
        raise ValueError("--measure needs the long video: give --long 60")
    refuse_url("--out", args.out)
    if args.long < 0:
        raise ValueError(f"--long must be seconds, or 0 for no long video, not {args.long}")
    return args


def model_of(args: argparse.Namespace) -> tuple[WorldModelConfig, Path]:
    """The configuration and the weights' folder, checked before anything is loaded."""
    config = presets.get(args.preset)
    folder = weights.resolve(config, args.weights)
    missing = [name for name in weights.FOLDERS.values() if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}/: it holds no weights of preset {config.name!r}")
    config = weights.config_for(config, folder)
    check_folder(config, folder)
    return config, folder


def trajectories_of(args: argparse.Namespace, config: WorldModelConfig) -> dict[str, Trajectory]:
    """By name, with intrinsics for the preset's image size. ValueError for lengths that the autoencoder cannot hold."""
    given = args.actions or ([] if args.trajectory else list(ACTIONS))
    found = {text: walk(args, config, text) for text in given}
    for path in args.trajectory or ():
        found[path.stem] = read_trajectory(path, config.image_size, config.fps, args.fov)
    if args.long_actions:
        check_length("--long-actions", walk(args, config, args.long_actions), config)
    for name, trajectory in found.items():
        check_length(name, trajectory, config)
    if args.tree:
        check_tree(config, list(found.values()))
    return found


def check_length(name: str, trajectory: Trajectory, config: WorldModelConfig) -> None:
    stride, frames = config.vae_stride[0], trajectory.num_frames
    if (frames - 1) % stride or frames == 1:
        near = max(1, round((frames - 1) / stride)) * stride
        raise ValueError(
            f"trajectory {name} has {frames} poses: give a multiple of {stride} and one more, such as {near + 1}"
        )
    if config.latent_frames(frames) > config.max_latent_frames:
        most = (config.max_latent_frames - 1) * stride / config.fps
        raise ValueError(f"trajectory {name} lasts {trajectory.duration:.0f} s: this model makes {most:.0f} s at most")


def walk(args: argparse.Namespace, config: WorldModelConfig, text: str) -> Trajectory:
    return parse_actions(
        text,
        args.key_map,
        config.fps,
        translation_speed=args.translation_speed,
        rotation_speed=args.rotation_speed,
        fov_deg=args.fov,
        image_size=config.image_size,
    )


def steering(args: argparse.Namespace, config: WorldModelConfig) -> Steering:
    return Steering(args.key_map, config.fps, args.translation_speed, args.rotation_speed)


def model_spec(
    args: argparse.Namespace, config: WorldModelConfig, folder: Path, device: str, dtype: torch.dtype
) -> ModelSpec:
    # Not by the number of actors: on a CPU, how many threads share a sum tells in its last bits.
    threads = min(4, os.cpu_count() or 1)
    where = (
        args.weights if (args.weights or "").startswith("hf://") else str(folder.resolve()) if args.weights else None
    )
    model = args.preset, where, device, dtype, args.quantization, args.num_steps
    return ModelSpec(*model, threads, steering(args, config), args.fov)


def pools(args: argparse.Namespace, config: WorldModelConfig, folder: Path) -> tuple[list[Any], list[Any]]:
    """Generators and refine writers, on GPUs where the cluster has some."""
    generators = args.generators if args.step != "refine" or args.long else 0
    refiners = args.refiners if args.step != "search" else 0
    actors = generators + refiners
    ray_cluster.connect(num_cpus=actors + 2)
    resources = ray.cluster_resources()
    if resources.get("CPU", 0) < actors:
        raise ValueError(f"the cluster has {resources.get('CPU', 0):.0f} CPUs for {actors} actors: start fewer")
    gpus = resources.get("GPU", 0)
    share = min(1.0, gpus / actors) if args.gpus_per_actor is None else args.gpus_per_actor
    if share * actors > gpus:
        raise ValueError(f"the cluster has {gpus:.0f} GPUs for {actors} actors of {share} each: start fewer, or share")
    device, dtype = ("cuda", torch.bfloat16) if share else ("cpu", torch.float32)
    spec = model_spec(args, config, folder, device, dtype)
    # Fractions must fit into whole GPUs, so they are rounded down.
    share = share if share in (0, 1) or args.gpus_per_actor else int(share * 100) / 100
    return start_pool(Generator, spec, generators, share), start_pool(RefineWriter, spec, refiners, share)


def long_candidate(args: argparse.Namespace, config: WorldModelConfig, image: StartImage, model: str) -> Candidate:
    """One video of --long seconds from `image`."""
    text = args.long_actions or long_actions(args.long, config.fps, args.key_map, config.vae_stride[0], args.seed)
    trajectory = walk(args, config, text)
    check_length("of --long", trajectory, config)
    return make_candidate(image, f"{trajectory.duration:.0f} s", trajectory, args.seed, model, purpose="long")


def measure(run: RunFolder, chosen: Candidate, config: WorldModelConfig) -> None:
    """Write the cost of the long video, of both stages together."""
    record, refined = run.record(chosen.key), run.refined(chosen.key)
    assert record is not None and refined is not None
    seconds = record["cost"]["seconds"] + refined["cost"]["seconds"]
    name = f"{config.name}_{record['cost']['device']}".replace("-", "_")
    figures = {
        f"seconds_for_{chosen.trajectory.duration:.0f}s_video": seconds,
        "peak_gb": max(record["cost"]["peak_gb"], refined["cost"]["peak_gb"]),
    }
    print(f"measured: {measurements.write(name, figures)}")


def measure_tree(args: argparse.Namespace, config: WorldModelConfig, folder: Path, leaves: list[Candidate]) -> None:
    """Time the first image's tree in this process, and write docs/measurements/search_tree.json."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline = model_spec(args, config, folder, device, dtype).load("text", "vae", "dit")
    tree = [leaf for leaf in leaves if leaf.root == leaves[0].root]
    figures = time_tree(pipeline, tree, steering(args, config), args.fov, args.batch_size)
    for name, figure in figures.items():
        print(f"{name:16} {figure:.4g}")
    print(f"measured: {measurements.write('search_tree', figures)}")


def resolved(
    args: argparse.Namespace, config: WorldModelConfig, folder: Path, candidates: list[Candidate]
) -> dict[str, Any]:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("images", "trajectory"):
        options[name] = None if options[name] is None else [str(path) for path in options[name]]
    images = sorted({candidate.image.name for candidate in candidates})
    plan = {"images": images, "candidates": len(candidates), "weights": str(folder)}
    return {"job": "search-refine", "options": options, "plan": plan, "config": dataclasses.asdict(config)}


if __name__ == "__main__":
    run_job(main)

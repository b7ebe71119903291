"""Measure a world model: does it follow its camera, stay sharp over a minute, and decode well.

Reads a store of fans: for each start, several true renderings that begin there and take different ways (keys START/0,
START/1 ...). One process on one device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from longtake.model import presets, weights
from longtake.model.camera import KEY_MAPS, Trajectory, parse_actions
from longtake.model.pipeline import WorldPipeline
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.identification import fans, identify, path_errors, psnr_db
from longtake.platform.evaluate.scores import color_drift, sharpness_drift
from longtake.platform.evaluate.sheets import contact_sheet
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.search.plan import long_actions
from longtake.platform.store.files import refuse_url


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    config = presets.get(args.preset)
    folder = weights.resolve(config, args.weights)
    config = weights.config_for(config, folder)
    store = ClipStore(args.store)
    starts = fans(store.keys()) if args.starts else {}
    starts = {name: starts[name] for name in _spread(list(starts), args.starts)}
    clips = ClipStore(args.clips or args.store)
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
    parts = ("text", "vae", "dit", "refiner") if args.refine else ("text", "vae", "dit")
    pipeline = WorldPipeline.from_pretrained(args.preset, args.weights, args.device, parts=parts)
    evaluation = Evaluation(pipeline, args)
    figures: dict[str, float] = {}
    if args.limit:
        figures["vae_psnr_db"] = evaluation.vae_psnr(clips)
    if starts:
        figures |= evaluation.identification(store, starts, with_camera=True)
        if args.without_camera:
            figures |= evaluation.identification(store, starts, with_camera=False)
        figures["starts"] = len(starts)
    if args.long and starts:
        figures |= evaluation.drift([store.read(keys[0]) for keys in list(starts.values())[: args.long_videos]])
    print(json.dumps(figures, indent=2))
    if args.write:
        print(f"figures: {measurements.write(args.name or f'{config.name}_quality'.replace('-', '_'), figures)}")
    print(f"contact sheets: {args.out.resolve()}")


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of the sorted names, evenly over all places."""
    chosen = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[at] for at in chosen]


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
    add("--long-videos", type=int, default=2, help="how many of those")
    add("--key-map", default="official", choices=KEY_MAPS)
    add("--translation-speed", type=float, help="of the long videos, metres a second; by default the key map's")
    add("--rotation-speed", type=float, help="of the long videos, degrees a second; by default the key map's")
    add("--refine", action="store_true", help="measure refined videos instead of those of stage 1")
    add("--num-steps", type=int, help="sampling steps; by default the preset's")
    add("--batch-size", type=int, help="videos made together; by default 16 on a GPU, 1 elsewhere")
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


class Evaluation:
    """The measures, each over one loaded pipeline."""

    def __init__(self, pipeline: WorldPipeline, args: argparse.Namespace) -> None:
        self.pipeline, self.config, self.args = pipeline, pipeline.config, args
        args.out.mkdir(parents=True, exist_ok=True)

    def vae_psnr(self, store: ClipStore) -> float:
        """Mean over test clips of the PSNR of decoded against true frames, dB."""
        values: list[float] = []
        keys = _spread(store.keys("test"), self.args.limit)
        if not keys:
            raise ValueError(f"{store.uri} has no clips of the test split: give --clips, or --limit 0")
        with Progress(len(keys), label="autoencoder") as progress:
            for key in keys:
                clip = self._checked(store.read(key))
                with self._precision():
                    decoded = self.pipeline.decode(self.pipeline.encode_video(clip.frames))
                values.append(psnr_db(clip.frames, decoded))
                if len(values) <= self.args.sheets:
                    sheet = {"true": clip.frames, f"decoded, {values[-1]:.1f} dB": decoded}
                    contact_sheet(self.args.out / f"vae_{len(values) - 1:02}.png", sheet)
                progress.update(1, psnr_db=float(np.mean(values)))
        return float(np.mean(values))

    def identification(self, store: ClipStore, starts: dict[str, list[str]], with_camera: bool) -> dict[str, float]:
        """Share of starts whose generated video is nearest to the true rendering of the same camera; and how far the
        paths of the nearest ones are from those asked for, means over starts in degrees and metres.

        Start number i takes rendering i modulo their number, and seed i.
        """
        names, kind = list(starts), "camera" if with_camera else "no camera"
        right, size, errors = 0, self.args.batch_size, []
        with Progress(len(names), label=kind) as progress:
            for first in range(0, len(names), size):
                numbers = range(first, min(first + size, len(names)))
                wanted = [number % len(starts[names[number]]) for number in numbers]
                clips = [
                    self._checked(store.read(starts[names[number]][way]))
                    for number, way in zip(numbers, wanted, strict=True)
                ]
                cameras = [clip.trajectory() for clip in clips]
                videos = self._generate(clips, cameras, list(numbers), with_camera)
                for number, way, video in zip(numbers, wanted, videos, strict=True):
                    fan = [store.read(key) for key in starts[names[number]]]
                    truths = [clip.frames for clip in fan]
                    nearest, distances = identify(video, truths)
                    right += nearest == way
                    errors.append(path_errors(fan[nearest].c2w, fan[way].c2w))
                    if number < self.args.sheets:
                        label = f"true {way} ({distances[way]:.1f}), nearest {nearest} ({distances[nearest]:.1f})"
                        sheet = {
                            f"generated, {kind}": video,
                            label: truths[way],
                            f"nearest, {nearest}": truths[nearest],
                        }
                        contact_sheet(self.args.out / f"{kind.replace(' ', '_')}_{number:02}.png", sheet)
                    progress.update(1, correct=right / (number + 1))
        ways, suffix = len(starts[names[0]]), "" if with_camera else "_no_camera"
        rotation, translation = np.mean(errors, axis=0)
        return {
            f"identification_{ways}way{suffix}": right / len(names),
            f"rotation_error_deg{suffix}": float(rotation),
            f"translation_error_m{suffix}": float(translation),
        }

    def drift(self, clips: list[Clip]) -> dict[str, float]:
        """Relative change of sharpness and colour from first to last second of long videos: means over `clips`."""
        args, config = self.args, self.config
        sharp, color = [], []
        second = max(1, round(config.fps))
        with Progress(len(clips), label=f"{args.long:.0f} s videos") as progress:
            for number, clip in enumerate(clips):
                text = long_actions(args.long, config.fps, args.key_map, config.vae_stride[0], number)
                walk = parse_actions(
                    text,
                    args.key_map,
                    config.fps,
                    translation_speed=args.translation_speed,
                    rotation_speed=args.rotation_speed,
                    image_size=config.image_size,
                )
                walk = dataclasses.replace(walk, intrinsics=torch.from_numpy(clip.intrinsics[0].copy()))
                frames = next(self._generate([self._checked(clip)], [walk], [number], True))
                sharp.append(sharpness_drift(frames[:second], frames[-second:]))
                color.append(color_drift(frames[:second], frames[-second:]))
                contact_sheet(args.out / f"long_{number:02}.png", {f"{args.long:.0f} s: {text}": frames}, columns=12)
                progress.update(1, sharpness_drift=sharp[-1], color_drift=color[-1])
        names = (f"sharpness_drift_{args.long:.0f}s", f"color_drift_{args.long:.0f}s")
        return {names[0]: float(np.mean(sharp)), names[1]: float(np.mean(color))}

    @torch.no_grad()
    def _generate(
        self, clips: list[Clip], trajectories: list[Trajectory], seeds: list[int], with_camera: bool
    ) -> Iterator[np.ndarray]:
        """Videos (F, H, W, 3) uint8 from the clips' first frames, decoded one at a time."""
        pipeline, captions = self.pipeline, [clip.caption for clip in clips]
        first = [clip.frames[0] for clip in clips]
        with self._precision():
            latents = pipeline.generate(first, captions, trajectories, seeds, self.args.num_steps, with_camera).float()
        for one, caption, seed in zip(latents.split(1), captions, seeds, strict=True):
            with self._precision():
                if self.args.refine:
                    one = pipeline.refine(one, *pipeline.encode_text([caption]), [seed])
                video = pipeline.decode(one.float())
            yield video

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.args.device).type, dtype=torch.bfloat16)

    def _checked(self, clip: Clip) -> Clip:
        stride = self.config.vae_stride[0]
        if clip.image_size != tuple(self.config.image_size) or (len(clip) - 1) % stride:
            height, width = self.config.image_size
            raise ValueError(
                f"clip {clip.key!r} is {len(clip)} frames of {clip.image_size[1]} x {clip.image_size[0]} pixels: "
                f"this model needs {stride} k + 1 frames of {width} x {height}"
            )
        return clip


if __name__ == "__main__":
    run_job(main)

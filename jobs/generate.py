"""Make one video from an image and a camera path; it can be watched while it is made.

Both stages and the decoder run in this process, on one device. The text of IMAGE.txt beside IMAGE is the prompt, if
none is given. Poses are written beside the video, as .npz.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from PIL import Image

from longtake.model import presets, weights
from longtake.model.camera import KEY_MAPS, Trajectory, parse_actions, repeated_actions
from longtake.model.config import WorldModelConfig
from longtake.model.float8 import QUANTIZATIONS, check
from longtake.model.parts import parts_of
from longtake.model.pipeline import WorldPipeline, check_folder
from longtake.model.video import make_video
from longtake.platform.observe.job import run_job
from longtake.platform.observe.measurements import peak_memory
from longtake.platform.observe.progress import Progress
from longtake.platform.search.plan import load_images, read_trajectory
from longtake.platform.store.files import refuse_url
from longtake.platform.store.video import write_video

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    folder = weights.resolve(config, args.weights)
    config = weights.config_for(config, folder)
    check_folder(config, folder)
    trajectory = trajectory_of(args, config)
    refuse_url("--out", args.out)
    if args.out.suffix != ".mp4":
        raise ValueError(f"--out {args.out} must end in .mp4")
    check(args.quantization, args.device)
    image, *others = load_images([args.image], WorldPipeline(config, {}).prepare_image, args.prompt)
    if others:
        raise ValueError(f"--image {args.image} is a folder of several images: give one")
    if args.dry_run:
        about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        about |= {"prompt": image.caption, "frames": trajectory.num_frames, "actions": trajectory.actions}
        print(json.dumps({"options": about, "config": dataclasses.asdict(config)}, indent=2))
        return
    parts = [part for part in parts_of(config) if args.refine or not part.startswith("refiner")]
    given = args.preset, args.weights, args.device, getattr(torch, args.dtype), parts, args.residency
    pipeline = WorldPipeline.from_pretrained(*given, quantization=args.quantization)
    if args.guidance_scale is not None:
        sampler = dataclasses.replace(config.sampler, guidance_scale=args.guidance_scale)
        pipeline.config = dataclasses.replace(config, sampler=sampler)
    started = time.monotonic()
    with _Stages() as stages:
        options = (args.seed, args.num_steps, args.negative_prompt, args.refine, stages.told)
        frames = make_video(pipeline, image.pixels, image.caption, trajectory, *options)
        write_video(
            args.out, frames, trajectory.fps, playable=lambda path: print(f"can be watched: {path}", flush=True)
        )
    trajectory.save(args.out.with_suffix(".npz"))
    seconds = time.monotonic() - started
    print(f"{args.out}: {trajectory.duration:.1f} s of video in {seconds:.1f} s, {peak_memory() / 1e9:.1f} GB")


class _Stages:
    """A line of progress for each stage that has begun."""

    def __init__(self) -> None:
        self.lines: dict[str, Progress] = {}

    def told(self, stage: str, done: int, total: int) -> None:
        if stage not in self.lines:
            self.lines[stage] = Progress(total, "latent frames" if stage != "stage 1" else "steps", stage)
        self.lines[stage].update(done - self.lines[stage].done)

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.lines.values():
            line.close()


def trajectory_of(args: argparse.Namespace, config: WorldModelConfig) -> Trajectory:
    """The camera path that the arguments describe. ValueError for one that the model cannot follow."""
    stride, fps = config.vae_stride[0], args.fps or config.fps
    if (args.actions is None) == (args.trajectory is None):
        raise ValueError("give the camera's path: either --actions or --trajectory")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds} must be more than 0")
    if args.actions is not None:
        length = parse_actions(args.actions, args.key_map).num_frames - 1
        wanted = length if args.seconds is None else args.seconds * fps
        frames = max(1, round(wanted / stride)) * stride
        speeds = {"translation_speed": args.translation_speed, "rotation_speed": args.rotation_speed}
        text = repeated_actions(args.actions, frames)
        path = parse_actions(text, args.key_map, fps, **speeds, fov_deg=args.fov, image_size=config.image_size)
    else:
        path = read_trajectory(args.trajectory, config.image_size, fps, args.fov)
        wanted = path.num_frames - 1 if args.seconds is None else min(path.num_frames - 1, round(args.seconds * fps))
        if (frames := wanted // stride * stride) < stride:
            raise ValueError(f"{args.trajectory} has {path.num_frames} poses: give at least {stride + 1}")
        path = path.window(0, frames + 1)
    if args.intrinsics is not None:
        path = dataclasses.replace(path, intrinsics=_pinhole(args, config).expand(path.num_frames, 4))
    latent = config.latent_frames(path.num_frames)
    if config.most_latent_frames is not None and latent > config.most_latent_frames:
        most = (config.most_latent_frames - 1) * stride / config.fps
        raise ValueError(f"{path.duration:.0f} s are more than the {most:.0f} s that this model makes: give --seconds")
    return path


def _pinhole(args: argparse.Namespace, config: WorldModelConfig) -> torch.Tensor:
    """--intrinsics, of the image as it is, for the image as the model sees it."""
    with Image.open(args.image) as image:
        size = image.height, image.width
    given = Trajectory(torch.eye(4)[None], torch.tensor([args.intrinsics]), size, config.fps)
    return given.resized(config.image_size).intrinsics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--image", type=Path, required=True, help="the first frame")
    add("--prompt", help="what it shows; by default the text file beside the image")
    add("--negative-prompt", default="", help="of models with guidance")
    add("--actions", help='keys and frames, such as "w-80,dw-40"; again from the beginning until --seconds are full')
    add("--trajectory", type=Path, help="in their place poses c2w (F, 4, 4) as .npy, or a saved .npz")
    add("--seconds", type=float, help="of the video; by default as long as the path")
    add("--seed", type=int, default=0, help="of the noise")
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())}")
    add("--weights", help="folder or hf://owner/name; by default those shipped with the preset")
    add("--num-steps", type=int, help="of stage 1; by default the weights' own")
    add("--guidance-scale", type=float, help="of stage 1; by default the weights' own")
    add("--no-refine", dest="refine", action="store_false", help="leave out the second stage")
    add("--key-map", default="official", choices=KEY_MAPS)
    add("--translation-speed", type=float, help="metres a second; by default the key map's")
    add("--rotation-speed", type=float, help="degrees a second; by default the key map's")
    add("--fov", type=float, default=75.0, help="horizontal field of view in degrees")
    add("--intrinsics", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="in its place, pixels of the image")
    add("--fps", type=float, help="frames a second; by default the model's")
    add("--residency", default="all", choices=("all", "stages", "blocks"), help="what is on the device at a time")
    add("--quantization", choices=QUANTIZATIONS, help="round what large matrix products take; off by default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=_DTYPES)
    add("--out", type=Path, default=Path("video.mp4"))
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

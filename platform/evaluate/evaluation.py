"""How well a world model follows its camera, lasts, and decodes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from longtake.model.camera import Trajectory
from longtake.model.pipeline import WorldPipeline
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.identification import identify, path_errors, psnr_db
from longtake.platform.evaluate.lpips import Lpips
from longtake.platform.evaluate.scores import color_drift, sharpness_drift
from longtake.platform.evaluate.sheets import contact_sheet
from longtake.platform.observe.progress import Progress


def spread(names: list[str], count: int) -> list[str]:
    """`count` of the sorted names, evenly over all places."""
    chosen = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[at] for at in chosen]


class Evaluation:
    """Measures of one loaded pipeline, with contact sheets in `out`: `sheets` of each kind at most.

    batch_size: videos made together; num_steps: of the sampler, by default the weights' own; refine: measure refined
    videos; bf16: compute under autocast; lpips: measure how far videos look from true ones.
    """

    def __init__(
        self,
        pipeline: WorldPipeline,
        out: Path,
        sheets: int = 8,
        batch_size: int = 1,
        num_steps: int | None = None,
        refine: bool = False,
        bf16: bool = False,
        lpips: Lpips | None = None,
    ) -> None:
        self.pipeline, self.config, self.out, self.sheets = pipeline, pipeline.config, out, sheets
        self.batch_size, self.num_steps, self.refined, self.bf16 = batch_size, num_steps, refine, bf16
        self.lpips = lpips
        out.mkdir(parents=True, exist_ok=True)

    def vae_psnr(self, store: ClipStore, limit: int) -> float:
        """Mean over `limit` test clips of the PSNR of decoded against true frames, dB."""
        values: list[float] = []
        keys = spread(store.keys("test"), limit)
        if not keys:
            raise ValueError(f"{store.uri} has no clips of the test split: give --clips, or --limit 0")
        with Progress(len(keys), label="autoencoder") as progress:
            for key in keys:
                clip = self._checked(store.read(key))
                with self._precision():
                    decoded = self.pipeline.decode(self.pipeline.encode_video(clip.frames))
                values.append(psnr_db(clip.frames, decoded))
                if len(values) <= self.sheets:
                    sheet = {"true": clip.frames, f"decoded, {values[-1]:.1f} dB": decoded}
                    contact_sheet(self.out / f"vae_{len(values) - 1:02}.png", sheet)
                progress.update(1, psnr_db=float(np.mean(values)))
        return float(np.mean(values))

    def identification(self, store: ClipStore, starts: dict[str, list[str]], with_camera: bool) -> dict[str, float]:
        """Share of starts whose generated video is nearest to the true rendering of the same camera; and how far the
        paths of the nearest ones are from those asked for, means over starts in degrees and metres; and with `lpips`
        how far videos look from the renderings of their own paths, a mean over all frames but the first.

        Start number i takes rendering i modulo their number, and seed i.
        """
        names, kind = list(starts), "camera" if with_camera else "no camera"
        right, size, errors, looks = 0, self.batch_size, [], []
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
                    if self.lpips is not None:
                        looks.append(float(self.lpips(video[1:], truths[way][1:]).mean()))
                    if number < self.sheets:
                        label = f"true {way} ({distances[way]:.1f}), nearest {nearest} ({distances[nearest]:.1f})"
                        sheet = {
                            f"generated, {kind}": video,
                            label: truths[way],
                            f"nearest, {nearest}": truths[nearest],
                        }
                        contact_sheet(self.out / f"{kind.replace(' ', '_')}_{number:02}.png", sheet)
                    progress.update(1, correct=right / (number + 1))
        ways, suffix = len(starts[names[0]]), "" if with_camera else "_no_camera"
        rotation, translation = np.mean(errors, axis=0)
        found = {
            f"identification_{ways}way{suffix}": right / len(names),
            f"rotation_error_deg{suffix}": float(rotation),
            f"translation_error_m{suffix}": float(translation),
        }
        return found | ({f"lpips{suffix}": float(np.mean(looks))} if looks else {})

    def drift(
        self, ways: Mapping[str, Sequence[tuple[Clip, Trajectory]]], span: float, rendered: Sequence[str] = ()
    ) -> dict[str, float]:
        """Of long videos, by the name of their way: each from a clip's first frame along a path. Relative change of
        sharpness and colour from their first `span` seconds to the last, of all together and, `_each`, the mean of what
        it is for each; where the path ends as it began, the last frame's PSNR to the first, dB; and the seconds that a
        video took. `_true` is the same of the clips themselves, which along the ways in `rendered` show these paths.

        A camera that walks for a minute ends at another place, as sharp as that is: of true renderings each changes by
        some 0.17, of which all together do not.
        """
        found: dict[str, list[float]] = {}
        together: dict[str, float] = {}
        count = max(1, round(span * self.config.fps))
        with Progress(sum(map(len, ways.values())), label="long videos") as progress:
            for name, videos in ways.items():
                ends: list[tuple[np.ndarray, np.ndarray]] = []
                for number, (clip, way) in enumerate(videos):
                    begin = time.monotonic()
                    frames = next(self._generate([self._checked(clip)], [way], [number], True))
                    measured = {
                        "seconds": time.monotonic() - begin,
                        f"sharpness_drift_{name}_each": sharpness_drift(frames[:count], frames[-count:]),
                        f"color_drift_{name}_each": color_drift(frames[:count], frames[-count:]),
                    }
                    ends.append((frames[:count].copy(), frames[-count:].copy()))  # and not the frames between
                    if torch.allclose(way.c2w[0], way.c2w[-1], atol=1e-3):
                        measured[f"return_psnr_db_{name}"] = psnr_db(frames[:1], frames[-1:])
                    for key, value in measured.items():
                        found.setdefault(key, []).append(value)
                    contact_sheet(self.out / f"long_{name}_{number:02}.png", {name: frames}, columns=12)
                    progress.update(1, **{key: value for key, value in measured.items() if "drift" in key})
                together |= _drift_of(ends, name)
                if name in rendered:
                    shown = (clip.frames[: way.num_frames] for clip, way in videos)
                    together |= _drift_of([(frames[:count], frames[-count:]) for frames in shown], f"{name}_true")
        return {key: float(np.mean(values)) for key, values in found.items()} | together

    @torch.no_grad()
    def _generate(
        self, clips: list[Clip], trajectories: list[Trajectory], seeds: list[int], with_camera: bool
    ) -> Iterator[np.ndarray]:
        """Videos (F, H, W, 3) uint8 from the clips' first frames, decoded one at a time."""
        pipeline, captions = self.pipeline, [clip.caption for clip in clips]
        first = [clip.frames[0] for clip in clips]
        with self._precision():
            latents = pipeline.generate(first, captions, trajectories, seeds, self.num_steps, with_camera).float()
        for one, caption, seed in zip(latents.split(1), captions, seeds, strict=True):
            with self._precision():
                if self.refined:
                    one = pipeline.refine(one, *pipeline.encode_text([caption]), [seed])
                video = pipeline.decode(one.float())
            yield video

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.pipeline.device.type, dtype=torch.bfloat16)

    def _checked(self, clip: Clip) -> Clip:
        stride = self.config.vae_stride[0]
        if clip.image_size != tuple(self.config.image_size) or (len(clip) - 1) % stride:
            height, width = self.config.image_size
            raise ValueError(
                f"clip {clip.key!r} is {len(clip)} frames of {clip.image_size[1]} x {clip.image_size[0]} pixels: "
                f"this model needs {stride} k + 1 frames of {width} x {height}"
            )
        return clip


def _drift_of(ends: Sequence[tuple[np.ndarray, np.ndarray]], name: str) -> dict[str, float]:
    """Of all videos together, from their first and last frames."""
    first, last = (np.concatenate(part) for part in zip(*ends, strict=True))
    return {f"sharpness_drift_{name}": sharpness_drift(first, last), f"color_drift_{name}": color_drift(first, last)}

"""What a search will do: images x trajectories x seeds, each a candidate with a key of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtake.model.camera import Trajectory, random_actions

ACTIONS = ("w-80", "s-80", "aw-80", "dw-80", "w-40,aw-40", "d-40,w-40")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True, eq=False)
class StartImage:
    """pixels: (H, W, 3) uint8 of the preset's size. name: unique in a plan."""

    name: str
    pixels: np.ndarray
    caption: str = ""
    licence: str = "unspecified"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One video to be: key is the same for the same inputs and weights, in every run and on every machine."""

    key: str
    image: StartImage
    trajectory: Trajectory
    trajectory_name: str
    seed: int
    purpose: str = "search"

    def described(self) -> dict[str, Any]:
        """What its record says of it, besides scores."""
        return {
            "key": self.key,
            "purpose": self.purpose,
            "image": self.image.name,
            "caption": self.image.caption,
            "trajectory": self.trajectory_name,
            "actions": self.trajectory.actions,
            "seed": self.seed,
            "fps": self.trajectory.fps,
            "num_frames": self.trajectory.num_frames,
            "licence": self.image.licence,
        }


def make_candidate(
    image: StartImage, name: str, trajectory: Trajectory, seed: int, model: str, purpose: str = "search"
) -> Candidate:
    """model: names the weights and the sampler, so that other weights give other candidates."""
    digest = hashlib.sha256()
    for part in (
        np.ascontiguousarray(image.pixels),
        image.caption.encode(),
        trajectory.c2w.numpy(),
        trajectory.intrinsics.numpy(),
        f"{seed} {model}".encode(),
    ):
        digest.update(hashlib.sha256(bytes(part)).digest())
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{image.name}_{name}").strip("-")[:60]
    return Candidate(f"{words}_s{seed}_{digest.hexdigest()[:10]}", image, trajectory, name, seed, purpose)


def make_plan(
    images: Sequence[StartImage], trajectories: dict[str, Trajectory], seeds: Sequence[int], model: str
) -> list[Candidate]:
    """All candidates, image by image, so that the first image is finished early. ValueError when two are the same."""
    candidates = [
        make_candidate(image, name, trajectory, seed, model)
        for image in images
        for name, trajectory in trajectories.items()
        for seed in seeds
    ]
    keys = [candidate.key for candidate in candidates]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"two candidates are the same ({twice}): give each image, trajectory and seed once")
    return candidates


def image_files(given: Iterable[Path]) -> list[Path]:
    """The images named, and those in the folders named. ValueError when there are none."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"no images in {path}: put .png or .jpg files there, or give --images")
            files += inside
        else:
            files.append(path)
    return files


def load_images(
    given: Iterable[Path], prepare: Callable[[Path], np.ndarray], prompt: str | None = None, licence: str | None = None
) -> list[StartImage]:
    """Read images through `prepare` (WorldPipeline.prepare_image).

    The caption of NAME.png is `prompt`, or the text of NAME.txt beside it, or empty; its licence is `licence`, or the
    first line of licence.txt in its folder. ValueError for a file that is no image.
    """
    images: list[StartImage] = []
    for path in image_files(given):
        pixels = prepare(path)
        same = sum(image.name.partition("~")[0] == path.stem for image in images)
        name = f"{path.stem}~{same + 1}" if same else path.stem
        caption = _text(path.with_suffix(".txt")) if prompt is None else prompt
        folder = _text(path.parent / "licence.txt").partition("\n")[0]
        images.append(StartImage(name, pixels, caption, licence or folder or "unspecified"))
    return images


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def long_actions(seconds: float, fps: float, key_map: str, stride: int, seed: int = 0) -> str:
    """Walking and turning for about `seconds`, in a number of frames that the autoencoder's stride divides."""
    frames = max(1, round(seconds * fps / stride)) * stride
    return random_actions(frames, seed, key_map)


def fingerprint(folder: Path) -> str:
    """Names the weights in `folder` without reading all of them: file names, sizes, and both ends of each file."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]

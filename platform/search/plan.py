"""What a search will do: images x trajectories x seeds, each a candidate with a key of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtake.model.camera import Trajectory, intrinsics_from_fov, random_actions

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
    """One video to be: key is the same for the same inputs and weights, in every run and on every machine.

    branches: of a candidate that is a leaf of a tree, the actions at each of its levels, in whole chunks.
    """

    key: str
    image: StartImage
    trajectory: Trajectory
    trajectory_name: str
    seed: int
    purpose: str = "search"
    branches: tuple[str, ...] = ()

    @property
    def root(self) -> tuple[str, int] | None:
        """Which tree it is a leaf of: of which image and seed."""
        return (self.image.name, self.seed) if self.branches else None

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
            "branches": list(self.branches),
            "licence": self.image.licence,
        }


def make_candidate(
    image: StartImage,
    name: str,
    trajectory: Trajectory,
    seed: int,
    model: str,
    purpose: str = "search",
    branches: tuple[str, ...] = (),
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
    key = f"{words}_s{seed}_{digest.hexdigest()[:10]}"
    return Candidate(key, image, trajectory, name, seed, purpose, branches)


def make_plan(
    images: Sequence[StartImage], trajectories: dict[str, Trajectory], seeds: Sequence[int], model: str
) -> list[Candidate]:
    """All candidates, image by image, so that the first image is finished early. ValueError when two are the same."""
    return _unlike(
        make_candidate(image, name, trajectory, seed, model)
        for image in images
        for name, trajectory in trajectories.items()
        for seed in seeds
    )


def make_tree(
    images: Sequence[StartImage],
    branches: Sequence[str],
    depth: int,
    walk: Callable[[str], Trajectory],
    seeds: Sequence[int],
    model: str,
) -> list[Candidate]:
    """All leaves of a tree for each image and seed, at each of whose `depth` levels the branches part. They are what
    `make_plan` would make of the same actions in one piece, and leaves that begin alike follow each other. walk: the
    trajectory of actions. ValueError when two leaves are the same.
    """
    paths = list(itertools.product(branches, repeat=depth))
    walks = {path: walk(",".join(path)) for path in paths}
    return _unlike(
        make_candidate(image, ",".join(path), walks[path], seed, model, branches=path)
        for image in images
        for seed in seeds
        for path in paths
    )


def _unlike(candidates: Iterable[Candidate]) -> list[Candidate]:
    found = {}
    for candidate in candidates:
        if candidate.key in found:
            raise ValueError(
                f"two candidates are the same ({candidate.key}): give each image, trajectory and seed once"
            )
        found[candidate.key] = candidate
    return list(found.values())


def subtrees(candidates: Sequence[Candidate], batch_size: int) -> list[list[list[Candidate]]]:
    """What one generator makes after another, as batches that are rolled out together.

    A subtree is the leaves that begin with the same branch: with others they share the image alone. What is no leaf
    shares nothing, so each batch of it stands for itself. Neither depends on what is finished: a candidate that is made
    again has the same neighbours, whose number tells in the last bits.
    """
    found = []
    for (tree, *_), group in itertools.groupby(candidates, key=lambda each: (each.root, each.branches[:-1][:1])):
        alike = list(group)
        batches = _leaf_batches(alike, batch_size) if tree else _batches(alike, batch_size)
        found += [batches] if tree else [[batch] for batch in batches]
    return found


def _batches(candidates: Sequence[Candidate], batch_size: int) -> list[list[Candidate]]:
    """Of one length each."""
    found = []
    for _, group in itertools.groupby(candidates, key=lambda each: each.trajectory.num_frames):
        alike = list(group)
        found += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return found


def _leaf_batches(leaves: Sequence[Candidate], batch_size: int) -> list[list[Candidate]]:
    """All leaves behind one node each, as high up as `batch_size` holds, or some of those that part last.

    A node that several batches need is then the only one that is made at its level, in whichever batch that happens.
    """
    branches, levels = len({leaf.branches[-1] for leaf in leaves}), 1
    while branches > 1 and branches ** (levels + 1) <= min(batch_size, len(leaves)):
        levels += 1
    found = []
    for _, group in itertools.groupby(leaves, key=lambda leaf: leaf.branches[:-levels]):
        alike = list(group)
        found += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return found


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


def read_trajectory(path: Path, image_size: tuple[int, int], fps: float, fov_deg: float) -> Trajectory:
    """A saved .npz, or poses c2w (F, 4, 4) as .npy, seen through a lens of `fov_deg`; for images of `image_size`."""
    if path.suffix == ".npz":
        return Trajectory.load(path).resized(image_size)
    return Trajectory.from_npy(path, intrinsics_from_fov(fov_deg, image_size), image_size, fps)


def long_actions(seconds: float, fps: float, key_map: str, stride: int, seed: int = 0) -> str:
    """Walking and turning for about `seconds`, in a number of frames that the autoencoder's stride divides."""
    frames = max(1, round(seconds * fps / stride)) * stride
    return random_actions(frames, seed, key_map)


def fingerprint(folder: Path) -> str:
    """Names the weights in `folder` without reading all of them: file names, sizes, and both ends of each file."""
    digest = hashlib.sha256()
    for path in sorted(file for part in folder.iterdir() for file in part.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]

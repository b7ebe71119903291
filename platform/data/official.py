"""The example training set of SANA-WM (section 4.3): zips of captions, zips of latents, and sidecars beside them.

DATA/NAME.zip holds KEY.json (prompt, width, height); CACHE/NAME.zip holds KEY.npz with `z` (C, T, h, w), normalised.
Next to the former may lie NAME_camera.npz (ids; ranges (start, count); pose (N, 4, 4) camera-to-world in OpenCV axes;
intrinsics (N, 4) in pixels of the video), NAME_metric_scale_stats.json (by key, what translations are multiplied by to
be metres), and captions of the static scene.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longtake.model.config import WorldModelConfig
from longtake.platform.data.latents import EncodedClip
from longtake.platform.data.store import DamagedShard

CAPTIONS = "_LongSceneStaticCaption-Qwen3-VL-30B-A3B-Instruct"


def pairs(data: Path, cache: Path) -> list[tuple[Path, Path]]:
    """Zips of captions with those of their latents, by name. ValueError when there are none."""
    found = [(path, cache / path.name) for path in sorted(data.glob("*.zip")) if (cache / path.name).is_file()]
    if not found:
        raise ValueError(f"no zip of {data} has its namesake in {cache}: give the folder of latents with --cache")
    return found


class OfficialZip:
    """The clips of one zip, as a preset trains on them.

    frames: raw frames a clip; longer clips are cut. min_bytes: smaller entries of latents are left out, which the
    official reader does below 10 MiB. DamagedShard for a zip, or an entry of it, that cannot be read.
    """

    def __init__(
        self, path: Path, cache: Path, config: WorldModelConfig, frames: int, licence: str = "", min_bytes: int = 0
    ) -> None:
        self.path, self.cache, self.config, self.frames, self.licence = path, cache, config, frames, licence
        about, latents = _entries(path, ".json", 0), _entries(cache, ".npz", min_bytes)
        self._entries = {key: (about[key], latents[key]) for key in sorted(about.keys() & latents.keys())}

    @property
    def keys(self) -> list[str]:
        return list(self._entries)

    def clip(self, key: str) -> EncodedClip | None:
        """The clip of that key, None when it is shorter than `frames`. ValueError for latents of another size."""
        about_name, latents_name = self._entries[key]
        about = json.loads(_content(self.path, about_name))
        latents = np.load(io.BytesIO(_content(self.cache, latents_name)), allow_pickle=False)["z"]
        shape = self.config.latent_channels, self.config.latent_frames(self.frames), *self.config.latent_size
        if (latents.shape[0], *latents.shape[2:]) != (shape[0], *shape[2:]):
            raise ValueError(f"{self.cache}: {key} is {latents.shape}, preset {self.config.name!r} trains on {shape}")
        if latents.shape[1] < shape[1]:
            return None
        c2w, intrinsics = self._camera(key, about)
        return EncodedClip(
            f"{self.path.stem}/{key}",
            latents[:, : shape[1]].astype(np.float16),
            c2w,
            intrinsics,
            self._captions.get(key) or about.get("prompt") or "",
            self.config.fps,
            licence=self.licence,
        )

    def _camera(self, key: str, about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Poses relative to frame 0, in metres, and intrinsics in pixels of the preset's images; the last ones last.

        Without a camera all poses are the identity, and the focal lengths are width and height.
        """
        height, width = self.config.image_size
        if key not in self._ranges:
            pinhole = np.array([width, height, width / 2, height / 2], np.float32)
            return np.tile(np.eye(4, dtype=np.float32), (self.frames, 1, 1)), np.tile(pinhole, (self.frames, 1))
        start, count = self._ranges[key]
        at = start + np.arange(self.frames).clip(max=count - 1)
        c2w, intrinsics = self._cameras["pose"][at].astype(np.float64), self._cameras["intrinsics"][at]
        c2w = np.linalg.inv(c2w[0]) @ c2w
        c2w[:, :3, 3] *= self._scale(key)
        size = width / about.get("width", width), height / about.get("height", height)
        return c2w.astype(np.float32), (intrinsics * np.array(size * 2)).astype(np.float32)

    @cached_property
    def _cameras(self) -> dict[str, np.ndarray]:
        sidecar = self.path.with_name(f"{self.path.stem}_camera.npz")
        if not sidecar.is_file():
            return {}
        with np.load(sidecar, allow_pickle=False) as arrays:
            return dict(arrays)

    @cached_property
    def _ranges(self) -> dict[str, tuple[int, int]]:
        """First pose and number of poses of each key that has any."""
        if not self._cameras:
            return {}
        ids, ranges = self._cameras["ids"].tolist(), self._cameras["ranges"].tolist()
        return {key: (start, count) for key, (start, count) in zip(ids, ranges, strict=True) if count}

    def _scale(self, key: str) -> float:
        """Metres in a unit of the translations: a number, or one in a table of statistics; 1 where it is not known."""
        found = self._scales.get(key)
        if isinstance(found, dict):
            found = found.get("score", found.get("median"))
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else 1.0

    @cached_property
    def _scales(self) -> dict[str, Any]:
        return _sidecar(self.path, "_metric_scale_stats")

    @cached_property
    def _captions(self) -> dict[str, str]:
        found = _sidecar(self.path, CAPTIONS)
        return {key: about["prompt"] if isinstance(about, dict) else about for key, about in found.items()}


def _entries(path: Path, suffix: str, min_bytes: int) -> dict[str, str]:
    """The names of a zip's entries by key."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except zipfile.BadZipFile as error:
        raise DamagedShard(f"{path} is not a whole zip: fetch it again ({error})") from None
    names = (entry.filename for entry in entries if entry.file_size >= min_bytes)
    return {name.removesuffix(suffix): name for name in names if name.endswith(suffix)}


def _content(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as file:
            return file.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedShard(f"{path}: {name} is damaged: fetch it again ({error})") from None


def _sidecar(path: Path, suffix: str) -> dict[str, Any]:
    """By key, what a JSON file beside the zip says: a table, entries that have a `key`, or such entries as lines."""
    whole, lines = (path.with_name(f"{path.stem}{suffix}.{kind}") for kind in ("json", "jsonl"))
    if whole.is_file():
        found = json.loads(whole.read_text())
    elif lines.is_file():
        found = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
    else:
        return {}
    return found if isinstance(found, dict) else {entry["key"]: entry for entry in found}

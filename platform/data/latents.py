"""Encoded clips: the latents of a video with the poses and caption that it came with, as Parquet shards.

One row is a clip (or a window of one). Arrays lie in binary columns, C order, little endian: latents float16, its
shape (C, T, h, w) in `shape`; c2w float32 (F, 4, 4), OpenCV axes, metres; intrinsics float32 (F, 4), pixels. F raw
frames give T = (F - 1) / 8 + 1. Where a frozen encoder read the caption, `text` has its features, float16
(n, text_dim); `refiner_text` the same of a refiner that reads it its own way. Of latents that a model made, `noisy` has
what they were at its `timesteps`, float16 (K, C, T, h, w); of pairs for a refiner, what the model made of them from
sigma = timestep / 1000. Stores of before have no such columns.
"""

from __future__ import annotations

import json
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("latents", pa.binary()),
        ("shape", pa.list_(pa.int32())),
        ("c2w", pa.binary()),
        ("intrinsics", pa.binary()),
        ("caption", pa.string()),
        ("fps", pa.float32()),
        ("split", pa.string()),
        ("licence", pa.string()),
        ("text", pa.binary()),
        ("text_dim", pa.int32()),
        ("noisy", pa.binary()),
        ("timesteps", pa.list_(pa.float32())),
        ("refiner_text", pa.binary()),
        ("refiner_text_dim", pa.int32()),
    ]
)
TEXT = ["text", "text_dim"]
TRAJECTORY = ["noisy", "timesteps"]
REFINER_TEXT = ["refiner_text", "refiner_text_dim"]
COLUMNS = [name for name in _SCHEMA.names if name not in TEXT + TRAJECTORY + REFINER_TEXT]
_ROW_GROUP_BYTES = 4 << 20  # a row is read with its group: small groups keep random access cheap


@dataclass
class EncodedClip:
    """Normalised latents float16 (C, T, h, w); c2w float32 (F, 4, 4); intrinsics float32 (F, 4) in pixels.

    text: features float16 (n, D) of the caption's n tokens, if a frozen encoder has read it; refiner_text: the same of
    the refiner's. noisy: float16 (K, C, T, h, w), the latents on their way from noise, at K `timesteps`, if a model has
    made them, or K versions of them for a refiner.
    """

    key: str
    latents: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    caption: str = ""
    fps: float = 16.0
    split: str = "train"
    licence: str = ""
    text: np.ndarray | None = None
    noisy: np.ndarray | None = None
    timesteps: tuple[float, ...] = ()
    refiner_text: np.ndarray | None = None

    def __post_init__(self) -> None:
        frames = len(self.c2w)
        if self.latents.ndim != 4:
            raise ValueError(f"{self.key}: latents must be (C, T, h, w), got {self.latents.shape}")
        if self.c2w.shape != (frames, 4, 4) or self.intrinsics.shape != (frames, 4):
            raise ValueError(
                f"{self.key}: c2w must be (F, 4, 4) and intrinsics (F, 4), "
                f"got {self.c2w.shape} and {self.intrinsics.shape}"
            )

    def row(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "key": self.key,
            "latents": np.ascontiguousarray(self.latents, np.float16).tobytes(),
            "shape": list(self.latents.shape),
            "c2w": np.ascontiguousarray(self.c2w, np.float32).tobytes(),
            "intrinsics": np.ascontiguousarray(self.intrinsics, np.float32).tobytes(),
            "caption": self.caption,
            "fps": self.fps,
            "split": self.split,
            "licence": self.licence,
            **_features("text", self.text),
            "noisy": None if self.noisy is None else np.ascontiguousarray(self.noisy, np.float16).tobytes(),
            "timesteps": list(self.timesteps),
            **_features("refiner_text", self.refiner_text),
        }


def _features(name: str, text: np.ndarray | None) -> dict[str, Any]:
    """The stored form of a caption's features."""
    if text is None:
        return {name: None, f"{name}_dim": None}
    return {name: np.ascontiguousarray(text, np.float16).tobytes(), f"{name}_dim": text.shape[1]}


def decode_row(row: dict[str, Any]) -> EncodedClip:
    """The inverse of `EncodedClip.row`; the arrays are read-only views of the row's bytes."""
    noisy = row.get("noisy")
    text, refiner_text = (
        None if row.get(name) is None else np.frombuffer(row[name], np.float16).reshape(-1, row[f"{name}_dim"])
        for name in ("text", "refiner_text")
    )
    return EncodedClip(
        key=row["key"],
        latents=np.frombuffer(row["latents"], np.float16).reshape(row["shape"]),
        c2w=np.frombuffer(row["c2w"], np.float32).reshape(-1, 4, 4),
        intrinsics=np.frombuffer(row["intrinsics"], np.float32).reshape(-1, 4),
        caption=row["caption"],
        fps=row["fps"],
        split=row["split"],
        licence=row["licence"],
        text=text,
        noisy=None if noisy is None else np.frombuffer(noisy, np.float16).reshape(-1, *row["shape"]),
        timesteps=tuple(row.get("timesteps") or ()),
        refiner_text=refiner_text,
    )


def _clips(path: str) -> Iterator[EncodedClip]:
    with fsspec.open(path, "rb") as source:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=16):
            yield from map(decode_row, batch.to_pylist())


class LatentStore:
    """A folder (local, or any that fsspec knows: s3://bucket/prefix) of latent shards."""

    def __init__(self, uri: str) -> None:
        self.uri = str(uri).rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.uri)

    def claim(self, encoding: dict[str, Any]) -> None:
        """Note how the store is encoded. ValueError when that was otherwise."""
        path = posixpath.join(self._root, "encoding.json")
        if self._fs.exists(path):
            if (found := json.loads(self._fs.cat_file(path))) != encoding:
                raise ValueError(f"{self.uri} holds latents of {found}, not of {encoding}: choose another --latents")
            return
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(path, json.dumps(encoding).encode())

    def write_shard(self, name: str, clips: Iterable[EncodedClip]) -> None:
        """Write one shard; readers see it only when it is whole. ValueError when there are no clips."""
        table = pa.Table.from_pylist([clip.row() for clip in clips], schema=_SCHEMA)
        if not table.num_rows:
            raise ValueError(f"shard {name!r} would be empty")
        rows = max(1, _ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes))
        self._fs.makedirs(self._root, exist_ok=True)
        final = posixpath.join(self._root, f"{name}.parquet")
        partial = posixpath.join(self._root, f".{name}.{uuid.uuid4().hex}.partial")
        with self._fs.open(partial, "wb") as sink:
            pq.write_table(table, sink, row_group_size=rows, compression="none", write_page_checksum=True)
        self._fs.mv(partial, final)

    def shards(self) -> list[str]:
        """Names of the shards, sorted; none for a folder that does not exist."""
        self._fs.invalidate_cache()
        paths = self._fs.glob(posixpath.join(self._root, "*.parquet"))
        return sorted(posixpath.basename(path).removesuffix(".parquet") for path in paths)

    def paths(self) -> list[str]:
        """The shards' paths or URLs. ValueError when there are none."""
        if names := self.shards():
            return [posixpath.join(self.uri, f"{name}.parquet") for name in names]
        raise ValueError(f"{self.uri} holds no latents: encode clips into it with jobs/encode_latents.py")

    def clips(self, split: str | None = None) -> Iterator[EncodedClip]:
        """All clips of the split, in the order of the shards' names."""
        for path in self.paths():
            yield from (clip for clip in _clips(path) if split in (None, clip.split))

    def read_shard(self, name: str) -> Iterator[EncodedClip]:
        """The clips of one shard, in order."""
        return _clips(posixpath.join(self.uri, f"{name}.parquet"))

    def dataset(self, columns: Sequence[str] | None = None):  # noqa: ANN201  (ray.data is imported when it is needed)
        """The stored rows as a ray.data.Dataset; `decode_row` turns a row into an EncodedClip."""
        import ray.data

        return ray.data.read_parquet(self.paths(), columns=list(columns) if columns else None)

    def __len__(self) -> int:
        return sum(pq.read_metadata(self._fs.open(path)).num_rows for path in self.paths())

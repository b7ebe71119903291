"""ClipStore: clips in a local folder or an S3 bucket, as Parquet shards that appear whole or not at all.

A row is a clip. `frames` is a list of JPEG images (quality 95, 4:4:4), so that a reader decodes only what it needs;
`c2w` and `intrinsics` are flat float32 lists; `provenance` is JSON. A row is a row group: one clip is one range read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from longtake.platform.data.clip import Clip
from longtake.platform.observe.job import CREDENTIALS

if TYPE_CHECKING:
    import ray.data

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("frames", pa.list_(pa.binary())),
        ("c2w", pa.list_(pa.float32())),
        ("intrinsics", pa.list_(pa.float32())),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps", pa.float64()),
        ("caption", pa.string()),
        ("metric_scale", pa.float64()),
        ("licence", pa.string()),
        ("provenance", pa.string()),
        ("split", pa.string()),
        ("actions", pa.string()),
    ]
)
_SUFFIX = ".parquet"


class DamagedShard(ValueError):
    """A shard, or a part of one, is not what was written."""


class ClipStore:
    """Clips under `uri`: a local folder or s3://bucket/prefix (another endpoint through AWS_ENDPOINT_URL).

    Reading raises ValueError when nothing is stored there or a shard is damaged; everything raises PermissionError
    when access is denied. Making a ClipStore touches nothing: the first shard creates the folder.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri).rstrip("/")
        if not self.uri:
            raise ValueError("a clip store needs a folder or an s3://bucket/prefix")
        # Other processes add shards, so listings are never cached.
        options = {"use_listings_cache": False} if self.uri.startswith("s3://") else {}
        self._fs, self._root = fsspec.core.url_to_fs(self.uri, **options)
        self._local = "file" in self._fs.protocol
        self._shard_of: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"ClipStore({self.uri!r})"

    def shards(self) -> list[str]:
        """Names of the whole shards, sorted; empty for a store that is yet to be written."""
        if self._local and os.path.isfile(self._root):
            raise ValueError(f"{self.uri} is a file: a clip store is a folder")
        with self._told(self.uri):
            try:
                paths = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = (path.rpartition("/")[2] for path in paths)
        return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX) and name[0] not in "._")

    def reading(self, name: str) -> contextlib.AbstractContextManager[None]:
        """While shard `name` is read by other means, let errors say which file is at fault, as this class's own do."""
        return self._told(self._path(name))

    def write_shard(self, name: str, clips: Iterable[Clip]) -> None:
        """Store `clips` as shard `name`, replacing one of that name; readers see all of it or nothing.

        ValueError for a name other than letters, digits and `.-_`, for no clips, and for a key given twice. When the
        disk is full, OSError; the shards written before stay valid.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"shard name {name!r} must be made of letters, digits and '.-_'")
        path = self._path(name)
        with self._told(path):
            if self._local:
                self._fs.makedirs(self._root, exist_ok=True)
                part = f"{self._root}/.{name}.{os.getpid()}.part"  # a leading dot hides it from every reader
                try:
                    with open(part, "wb") as file:
                        _write(file, clips)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(part, path)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(part)
            else:
                buffer = io.BytesIO()
                _write(buffer, clips)
                self._fs.pipe_file(path, buffer.getvalue())

    def keys(self, split: str | None = None) -> list[str]:
        """The clips' keys, in the order of shards."""
        table = self._table(["key", "split"])
        return [key for key, of in zip(*table, strict=True) if split in (None, of)]

    def __len__(self) -> int:
        """How many clips are stored."""
        return sum(self._file(name).metadata.num_rows for name in self._present())

    def clips(self, split: str | None = None, licence: str | None = None) -> Iterator[Clip]:
        """The clips of one split and licence (None: of all), decoded one at a time."""
        for name in self._present():
            file = self._file(name)
            for index in range(file.num_row_groups):
                with self._told(self._path(name)):
                    about = file.read_row_group(index, columns=["split", "licence"]).to_pylist()
                    if not any(split in (None, row["split"]) and licence in (None, row["licence"]) for row in about):
                        continue
                    rows = file.read_row_group(index).to_pylist()
                for row in rows:
                    if split in (None, row["split"]) and licence in (None, row["licence"]):
                        with self._told(self._path(name)):
                            clip = decode_clip(row)
                        yield clip

    def read(self, key: str) -> Clip:
        """The clip of that key. ValueError when there is none."""
        if key not in self._shard_of:
            for name in self._present():
                self._shard_of |= dict.fromkeys(self._column(name, "key"), name)
        if key not in self._shard_of:
            raise ValueError(f"no clip {key!r} in {self.uri}: ClipStore.keys() lists them")
        name = self._shard_of[key]
        file = self._file(name)
        with self._told(self._path(name)):
            for index in range(file.num_row_groups):
                if key in file.read_row_group(index, columns=["key"])["key"].to_pylist():
                    row = next(row for row in file.read_row_group(index).to_pylist() if row["key"] == key)
                    return decode_clip(row)
        raise ValueError(f"shard {name} of {self.uri} changed while it was read: try again")

    def dataset(self, split: str | None = None, licence: str | None = None) -> ray.data.Dataset:
        """The rows as stored, as a Ray Dataset; `decode_clip` turns one into a Clip.

        split, licence: keep those clips only (None: all), decided before any frame is read.
        """
        import ray.data
        from ray.data.expressions import col

        paths = [self._path(name) for name in self._present()]
        rows = ray.data.read_parquet(paths, filesystem=None if self._local else self._fs)
        for column, value in (("split", split), ("licence", licence)):
            if value is not None:
                rows = rows.filter(expr=col(column) == value)
        return rows

    def _present(self) -> list[str]:
        if names := self.shards():
            return names
        raise ValueError(f"no clips in {self.uri}: render some with `longtake render-worlds --store {self.uri}`")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{_SUFFIX}"

    def _file(self, name: str) -> pq.ParquetFile:
        path = self._path(name)
        with self._told(path):
            file = path if self._local else self._fs.open(path, "rb")
            return pq.ParquetFile(file, page_checksum_verification=True)

    def _column(self, name: str, column: str) -> list[Any]:
        file = self._file(name)
        with self._told(self._path(name)):
            return file.read(columns=[column])[column].to_pylist()

    def _table(self, columns: list[str]) -> list[list[Any]]:
        """The columns over all shards."""
        names = self._present()
        return [[value for name in names for value in self._column(name, column)] for column in columns]

    def _told(self, path: str) -> contextlib.AbstractContextManager[None]:
        return telling(path, self._local)


@contextlib.contextmanager
def telling(path: str, local: bool) -> Iterator[None]:
    """While the shard at `path` is in use, let errors say which file is at fault, and what to do about it."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DamagedShard(f"{path} is not a whole shard: delete it and make it again ({_line(error)})") from error
    except PermissionError as error:
        advice = "check the folder's permissions" if local else CREDENTIALS
        raise PermissionError(f"access to {path} was denied: {advice}") from error
    except OSError as error:
        # Arrow reports a corrupt page as a bare OSError; those of the system carry an errno, those of a slow network
        # are timeouts.
        if error.errno is None and not isinstance(error, (FileNotFoundError, TimeoutError)):
            raise DamagedShard(f"{path} is damaged: delete it and make it again ({_line(error)})") from error
        error.filename = error.filename or path  # a full disk does not say where it is
        raise


def encode_frame(frame: np.ndarray) -> bytes:
    """A (H, W, 3) uint8 RGB frame as JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_frame(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encode_clip(clip: Clip) -> dict[str, Any]:
    """A clip as a row of SCHEMA."""
    height, width = clip.image_size
    return {
        "key": clip.key,
        "frames": [encode_frame(frame) for frame in clip.frames],
        "c2w": clip.c2w.ravel(),
        "intrinsics": clip.intrinsics.ravel(),
        "num_frames": len(clip),
        "height": height,
        "width": width,
        "fps": clip.fps,
        "caption": clip.caption,
        "metric_scale": clip.metric_scale,
        "licence": clip.licence,
        "provenance": json.dumps(clip.provenance, sort_keys=True),
        "split": clip.split,
        "actions": clip.actions,
    }


def decode_clip(row: Mapping[str, Any], start: int | None = None, stop: int | None = None) -> Clip:
    """The clip of a stored row, or its frames [start, stop): only those are decoded.

    The key of a part stays that of the whole; its `actions` are dropped, since they describe the whole.
    """
    if missing := [name for name in SCHEMA.names if name not in row]:
        raise ValueError(f"a row without {missing[0]!r} is no clip: give a store made by `longtake render-worlds`")
    wanted = slice(start, stop)
    whole = wanted.indices(row["num_frames"]) == (0, row["num_frames"], 1)
    frames = [decode_frame(data) for data in row["frames"][wanted]]
    if not frames:
        raise ValueError(f"clip {row['key']!r} has {row['num_frames']} frames, none in [{start}, {stop})")
    return Clip(
        key=row["key"],
        frames=np.stack(frames),
        c2w=np.asarray(row["c2w"], dtype=np.float32).reshape(-1, 4, 4)[wanted],
        intrinsics=np.asarray(row["intrinsics"], dtype=np.float32).reshape(-1, 4)[wanted],
        fps=row["fps"],
        caption=row["caption"],
        metric_scale=row["metric_scale"],
        licence=row["licence"],
        provenance=json.loads(row["provenance"]),
        split=row["split"],
        actions=row["actions"] if whole else None,
    )


def _write(file: Any, clips: Iterable[Clip]) -> None:
    keys: set[str] = set()
    # JPEG does not compress again.
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(file, SCHEMA, **options) as writer:
        for clip in clips:
            if clip.key in keys:
                raise ValueError(f"two clips of one shard have the key {clip.key!r}")
            keys.add(clip.key)
            writer.write_table(pa.Table.from_pylist([encode_clip(clip)], SCHEMA))
    if not keys:
        raise ValueError("a shard needs at least one clip")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]

"""Random access to the rows of a folder of Parquet files, local or in an object store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtake.platform.data.store import telling


@dataclass(frozen=True)
class RowIndex:
    """Where each row of the split lies: file, row group and place in the group; rows in the order of the file names.

    A row is read with its row group, so small row groups make random access cheap.
    """

    paths: tuple[str, ...]
    file: np.ndarray
    group: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    @property
    def stored(self) -> list[str]:
        """Names of the columns that the first file has."""
        return _open(self.paths[0]).schema_arrow.names

    def columns(self, rows: Sequence[int] | np.ndarray, names: list[str]) -> list[dict[str, pa.Scalar]]:
        """The named columns of `rows` as Arrow scalars, in that order; a row group that holds several is read once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for position, row in enumerate(rows):
            groups.setdefault((int(self.file[row]), int(self.group[row])), []).append(position)
        found: list[dict[str, pa.Scalar]] = [{}] * len(rows)
        for (file, group), positions in groups.items():
            with _telling(self.paths[file]):
                table = open_with(self.paths[file], names).read_row_group(group, columns=names, use_threads=False)
            for position in positions:
                place = int(self.place[rows[position]])
                found[position] = {name: table.column(name)[place] for name in names}
        return found

    def read(self, rows: Sequence[int] | np.ndarray, names: list[str]) -> list[dict[str, Any]]:
        """As `columns`, as Python values."""
        return [{name: value.as_py() for name, value in row.items()} for row in self.columns(rows, names)]


def index_rows(paths: Sequence[str], split: str | None = None, licences: Sequence[str] | None = None) -> RowIndex:
    """Index the rows of `paths` (local paths or URLs) whose columns `split` and `licence` match.

    ValueError, here and where rows are read, names a shard that is damaged.
    """
    paths = tuple(sorted(paths))
    wanted = {name: allowed for name, allowed in (("split", split and [split]), ("licence", licences)) if allowed}

    def scan(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with _telling(paths[number]):
            file = open_with(paths[number], list(wanted))
            about = file.read(columns=list(wanted)) if wanted else {}
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        group = np.repeat(np.arange(len(sizes)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes]) if sizes else group
        keep = np.ones(len(group), bool)
        for name, allowed in wanted.items():
            keep &= np.isin(np.asarray(about[name].to_pylist(), dtype=str), list(allowed))
        return np.full(int(keep.sum()), number), group[keep], place[keep]

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(scan, range(len(paths))))
    file, group, place = (
        np.concatenate([part[i] for part in parts] or [np.zeros(0)]).astype(np.int32) for i in range(3)
    )
    return RowIndex(paths, file, group, place)


_files = threading.local()  # a Parquet reader belongs to one thread


def _telling(path: str) -> AbstractContextManager[None]:
    return telling(path, local="://" not in path)


def open_with(path: str, names: Sequence[str]) -> pq.ParquetFile:
    """The file at `path`; ValueError when it has not all of these columns."""
    file = _open(path)
    present = file.schema_arrow.names
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{path} has no column {missing[0]!r}: it is of another kind, or no shard of Longtake's")
    return file


def _open(path: str) -> pq.ParquetFile:
    if not hasattr(_files, "open"):
        _files.open = lru_cache(maxsize=256)(_open_file)
    return _files.open(path)


def _open_file(path: str) -> pq.ParquetFile:
    if "://" in path:
        return pq.ParquetFile(fsspec.open(path, "rb").open())  # type: ignore[arg-type]
    return pq.ParquetFile(path, memory_map=True)

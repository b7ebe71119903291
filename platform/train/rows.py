"""Random access to the rows of a folder of Parquet files, local or in an object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtake.platform.data.patience import patiently
from longtake.platform.data.store import DamagedShard, telling
from longtake.platform.observe.notices import say

T = TypeVar("T")

_STAND_INS = 8  # rows tried in place of a damaged one


@dataclass(frozen=True)
class RowIndex:
    """Where each row of the split lies: file, row group and place in the group; rows in the order of the file names.

    A row is read with its row group, so small row groups make random access cheap. damaged: what is wrong with the
    files that are left out.
    """

    paths: tuple[str, ...]
    file: np.ndarray
    group: np.ndarray
    place: np.ndarray
    damaged: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.file)

    @property
    def stored(self) -> list[str]:
        """Names of the columns that the first file has."""
        return patiently(self.paths[0], lambda: _open(self.paths[0]).schema_arrow.names)

    def columns(self, rows: Sequence[int] | np.ndarray, names: list[str]) -> list[dict[str, pa.Scalar]]:
        """The named columns of `rows` as Arrow scalars, in that order; a row group that holds several is read once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for position, row in enumerate(rows):
            groups.setdefault((int(self.file[row]), int(self.group[row])), []).append(position)
        found: list[dict[str, pa.Scalar]] = [{}] * len(rows)
        for (file, group), positions in groups.items():
            table = patiently(self.paths[file], partial(self._group, self.paths[file], group, names))
            for position in positions:
                place = int(self.place[rows[position]])
                found[position] = {name: table.column(name)[place] for name in names}
        return found

    @staticmethod
    def _group(path: str, group: int, names: list[str]) -> pa.Table:
        with _telling(path):
            return open_with(path, names).read_row_group(group, columns=names, use_threads=False)

    def read(self, rows: Sequence[int] | np.ndarray, names: list[str]) -> list[dict[str, Any]]:
        """As `columns`, as Python values."""
        return [{name: value.as_py() for name, value in row.items()} for row in self.columns(rows, names)]

    def whole(self, rows: np.ndarray, read: Callable[[np.ndarray, np.ndarray], T]) -> T:
        """read(rows, their places 0, 1, ... in the batch), with another row in place of each that proves damaged.

        Which other is a function of the row's number, so that all workers, and a run that is resumed, agree on it, and
        the order of all other samples stays as it is. DamagedShard when its stand-ins are damaged as well.
        """
        places = np.arange(len(rows))
        try:
            return read(rows, places)
        except DamagedShard:
            stand_ins = [self._whole_row(int(row), places[n : n + 1], read) for n, row in enumerate(rows)]
            return read(np.array(stand_ins), places)

    def _whole_row(self, row: int, place: np.ndarray, read: Callable[[np.ndarray, np.ndarray], Any]) -> int:
        found: list[DamagedShard] = []
        for candidate in (row, *np.random.default_rng((row, len(self))).integers(len(self), size=_STAND_INS)):
            try:
                read(np.array([candidate]), place)
                return int(candidate)
            except DamagedShard as error:
                say(f"{error}; another clip takes the place of a damaged one")
                found.append(error)
        raise found[0]


def index_rows(paths: Sequence[str], split: str | None = None, licences: Sequence[str] | None = None) -> RowIndex:
    """Index the rows of `paths` (local paths or URLs) whose columns `split` and `licence` match.

    Files that are damaged as a whole are left out, and listed in the index's `damaged`. DamagedShard when all of them
    are, and where rows are read.
    """
    paths = tuple(sorted(paths))
    wanted = {name: allowed for name, allowed in (("split", split and [split]), ("licence", licences)) if allowed}

    def scan(path: str) -> tuple[np.ndarray, np.ndarray] | DamagedShard:
        try:
            return patiently(path, partial(scan_once, path))
        except DamagedShard as error:
            return error

    def scan_once(path: str) -> tuple[np.ndarray, np.ndarray]:
        with _telling(path):
            file = open_with(path, list(wanted))
            about = file.read(columns=list(wanted)) if wanted else {}
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        group = np.repeat(np.arange(len(sizes)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes]) if sizes else group
        keep = np.ones(len(group), bool)
        for name, allowed in wanted.items():
            keep &= np.isin(np.asarray(about[name].to_pylist(), dtype=str), list(allowed))
        return group[keep], place[keep]

    with ThreadPoolExecutor(16) as pool:
        scanned = list(pool.map(scan, paths))
    damaged = [found for found in scanned if isinstance(found, DamagedShard)]
    if damaged and len(damaged) == len(paths):
        raise damaged[0]
    parts = [(path, *found) for path, found in zip(paths, scanned, strict=True) if not isinstance(found, DamagedShard)]
    file = np.repeat(np.arange(len(parts)), [len(group) for _, group, _ in parts]).astype(np.int32)
    group, place = (np.concatenate([part[i] for part in parts] or [np.zeros(0)]).astype(np.int32) for i in (1, 2))
    return RowIndex(tuple(path for path, *_ in parts), file, group, place, tuple(map(str, damaged)))


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
        return pq.ParquetFile(fsspec.open(path, "rb").open(), page_checksum_verification=True)  # type: ignore[arg-type]
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)

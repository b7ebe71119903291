"""Random access to the rows of a folder of Parquet files, local or in an object store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq


@dataclass(frozen=True)
class RowIndex:
    """Where each row of the split lies: file, row group and place inside the group; rows in the order of the file names.

    A row is read with its row group, so small row groups make random access cheap.
    """

    paths: tuple[str, ...]
    file: np.ndarray
    group: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    def digest(self) -> str:
        """Changes when files or rows are added or removed."""
        names = "\n".join(path.rpartition("/")[2] for path in self.paths)
        digest = hashlib.sha256(names.encode())
        for part in (self.file, self.group, self.place):
            digest.update(part.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def read(self, rows: Sequence[int] | np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
        """The columns of `rows`, in that order; a row group that holds several of them is read once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for position, row in enumerate(rows):
            groups.setdefault((int(self.file[row]), int(self.group[row])), []).append(position)
        found: list[dict[str, Any]] = [{}] * len(rows)
        for (file, group), positions in groups.items():
            table = _open(self.paths[file]).read_row_group(group, columns=columns)
            for position in positions:
                found[position] = table.slice(int(self.place[rows[position]]), 1).to_pylist()[0]
        return found


def index_rows(paths: Sequence[str], split: str | None = None, licences: Sequence[str] | None = None) -> RowIndex:
    """Index the rows of `paths` (local paths or URLs) whose columns `split` and `licence` match."""
    paths = tuple(sorted(paths))
    wanted = {name: allowed for name, allowed in (("split", split and [split]), ("licence", licences)) if allowed}

    def scan(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        file = _open(paths[number])
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        group = np.repeat(np.arange(len(sizes)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes]) if sizes else group
        keep = np.ones(len(group), bool)
        if wanted:
            table = file.read(columns=list(wanted))
            for name, allowed in wanted.items():
                keep &= np.isin(np.asarray(table[name].to_pylist(), dtype=str), list(allowed))
        return np.full(int(keep.sum()), number), group[keep], place[keep]

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(scan, range(len(paths))))
    file, group, place = (np.concatenate([part[i] for part in parts] or [np.zeros(0)]).astype(np.int32) for i in range(3))
    return RowIndex(paths, file, group, place)


@lru_cache(maxsize=512)
def _open(path: str) -> pq.ParquetFile:
    if "://" in path:
        return pq.ParquetFile(fsspec.open(path, "rb").open())
    return pq.ParquetFile(path, memory_map=True)

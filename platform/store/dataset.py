"""The selected videos as a data set for others: WebDataset shards, or Parquet shards beside MP4 files.

It is made from results.parquet and the videos alone, in the order of their keys, and neither holds a time: the same
candidates give the same bytes, in whatever order and however often interrupted they were made.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.platform.store.files import whole, write
from longtake.platform.store.table import SCHEMA

KINDS = ("webdataset", "parquet")
_ROWS = 64  # of a shard


def write_dataset(table: Path, kind: str, rows_of_shard: int = _ROWS) -> Path:
    """Write dataset/ beside `table`, in place of one that was there; returns the folder.

    webdataset: 00000.tar and so on, of KEY.mp4 and KEY.json each: poses c2w (F, 4, 4) in OpenCV axes and metres,
    intrinsics (F, 4) in pixels, fps, caption, actions, licence, provenance, scores before and after refining.
    parquet: 00000.parquet and so on, with the columns of `table`, and the videos they name, in videos/.

    ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of data set {kind!r}: choose one of {', '.join(KINDS)}")
    rows = sorted(pq.read_table(table).to_pylist(), key=lambda row: row["key"])
    rows = [row for row in rows if row["selected"] and row["video"]]
    folder = table.with_name("dataset")
    shards = [rows[start : start + rows_of_shard] for start in range(0, len(rows), rows_of_shard)]
    files: set[Path] = set()
    for number, shard in enumerate(shards):
        if kind == "webdataset":
            files.add(_write_tar(folder / f"{number:05}.tar", shard, table.parent))
        else:
            files |= _write_parquet(folder / f"{number:05}.parquet", shard, table.parent)
    for path in folder.rglob("*"):  # of other candidates, or of another kind
        if path.is_file() and path not in files:
            path.unlink()
    return folder


def _write_tar(path: Path, rows: list[dict[str, Any]], run: Path) -> Path:
    with whole(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            about = json.dumps(_described(row), sort_keys=True).encode()
            for suffix, content in (("json", about), ("mp4", (run / row["video"]).read_bytes())):
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")  # of nobody, at time 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def _described(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON holds it."""
    flat, pinholes = row["c2w"], row["intrinsics"]
    poses = [[flat[at + 4 * line : at + 4 * line + 4] for line in range(4)] for at in range(0, len(flat), 16)]
    arrays = {"c2w": poses, "intrinsics": [pinholes[at : at + 4] for at in range(0, len(pinholes), 4)]}
    kept = {name: value for name, value in row.items() if name not in ("selected", "video")}
    return kept | arrays | {"provenance": json.loads(row["provenance"])}


def _write_parquet(path: Path, rows: list[dict[str, Any]], run: Path) -> set[Path]:
    copies = {row["key"]: path.parent / "videos" / f"{row['key']}.mp4" for row in rows}
    for row in rows:
        write(copies[row["key"]], (run / row["video"]).read_bytes())
    named = [row | {"video": copies[row["key"]].relative_to(path.parent).as_posix()} for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(named, SCHEMA), buffer)
    write(path, buffer.getvalue())
    return {path, *copies.values()}

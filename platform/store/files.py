"""Files that are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block succeeds and is removed when it fails.

    The partial name keeps the suffix, by which encoders choose their format, and begins with a dot, so that no pattern
    such as *.mp4 finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where it is
        raise
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, data: bytes | str) -> None:
    """Put `data` at `path` at once. A file that holds just that already is left alone."""
    data = data.encode() if isinstance(data, str) else data
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with whole(path) as part:
        part.write_bytes(data)


def refuse_url(option: str, folder: str | Path) -> None:
    """ValueError when the `folder` given with `option` lies in an object store: `write` needs a file system."""
    if ":/" in str(folder):  # of s3://bucket a Path keeps s3:/bucket
        raise ValueError(f"{option} {folder} must be a local folder: copy it to the object store afterwards")


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`."""
    for part in folder.glob(".*.part.*"):
        part.unlink(missing_ok=True)

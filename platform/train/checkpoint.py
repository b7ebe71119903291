"""Checkpoints: whole or invisible. A folder is written under another name, its list of files last, and renamed.

RUN/checkpoints/step-00000400/COMPLETE holds {"files": {name: bytes}}; a folder without it, or whose files differ from
it, is not a checkpoint. All workers of a run see the same RUN.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_MARKER = "COMPLETE"
_PARTIAL = ".partial"


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = [path for path in folder.glob("step-*") if path.suffix != _PARTIAL and is_complete(path)]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def reached(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = newest(folder)
    return step_of(found) if found else 0


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that COMPLETE lists is there in full length."""
    try:
        files = json.loads((checkpoint / _MARKER).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def write(
    folder: Path, step: int, write_files: Callable[[Path], None], *, rank: int, barrier: Callable[[], None]
) -> Path:
    """Let every worker put its files into one new checkpoint; returns its final path. To be called by all workers.

    write_files(path): writes the calling worker's files. barrier: returns when all workers have called it.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(_PARTIAL)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    write_files(partial)
    barrier()
    if rank == 0:
        _complete(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    barrier()
    return final


def prune(folder: Path, keep: int) -> None:
    """Leave the newest `keep` complete checkpoints; remove older ones and what interrupted writes left."""
    whole = sorted(
        (path for path in folder.glob("step-*") if is_complete(path) and path.suffix != _PARTIAL), key=step_of
    )
    for path in folder.glob("step-*"):
        if path not in whole[-keep:]:
            shutil.rmtree(path, ignore_errors=True)


def _complete(partial: Path) -> None:
    files = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    with (partial / _MARKER).open("w") as marker:
        json.dump({"files": files}, marker, indent=2)
        marker.flush()
        os.fsync(marker.fileno())

"""The folder of one search. Each file is written once, whole, by the driver; what exists is not made again.

rollouts/KEY.npz    stage-1 latents (float16), c2w, intrinsics
records/KEY.json    the candidate, its scores and its cost: stage 1 is finished
selection.json      which of them are refined, from their scores alone
refined/KEY.mp4     the refined video
refined/KEY.json    what is known of it: stage 2 is finished
clips/              the refined videos with their poses, as a ClipStore that the training jobs read
dataset/            the selected videos in a form that others read, where it was asked for
results.parquet, index.html    made from the above, replaced as it grows
"""

from __future__ import annotations

import fcntl
import io
import json
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from longtake.platform.data.store import ClipStore
from longtake.platform.store.files import remove_partial, write

Record = dict[str, Any]


class RunFolder:
    """Opens `path` for one writer, creating it.

    OSError when it cannot be written to, ValueError when another process is writing to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folders = {name: path / name for name in ("rollouts", "records", "refined", "clips")}
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: --out needs a folder")
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        for folder in (path, *self._folders.values()):
            remove_partial(folder)
        self.clips = ClipStore(self._folders["clips"])

    def _locked(self) -> IO[str]:
        """The lock dies with the process that holds it."""
        lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another search is writing to {self.path}: wait for it, or choose another --out"
            ) from None
        return lock

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    def rollout(self, key: str) -> dict[str, np.ndarray] | None:
        """latents (C, T, h, w) float16, c2w (F, 4, 4), intrinsics (F, 4); None when there is none yet."""
        path = self._folders["rollouts"] / f"{key}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged: delete it, and it is made again") from error

    def write_rollout(self, key: str, latents: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, latents=latents.astype(np.float16), c2w=c2w, intrinsics=intrinsics)
        write(self._folders["rollouts"] / f"{key}.npz", buffer.getvalue())

    def record(self, key: str) -> Record | None:
        """The candidate and its scores, None until stage 1 is finished."""
        return _read(self._folders["records"] / f"{key}.json")

    def seconds_spent(self) -> float:
        """Of device time on all candidates that are rolled out; the long video is none."""
        records = (self.record(key) for key in self.finished())
        return sum(record["cost"]["seconds"] for record in records if record and record["purpose"] == "search")

    def write_record(self, key: str, record: Record) -> None:
        write(self._folders["records"] / f"{key}.json", json.dumps(record, indent=1))

    def selection(self) -> Record | None:
        """What was ranked and selected of each image, None until something was."""
        return _read(self.path / "selection.json")

    def write_selection(self, selection: Record) -> None:
        write(self.path / "selection.json", json.dumps(selection, indent=1))

    def refined(self, key: str) -> Record | None:
        """What is known of the refined video, None until stage 2 is finished."""
        return _read(self._folders["refined"] / f"{key}.json")

    def write_refined(self, key: str, video: bytes, record: Record) -> None:
        """The record comes last: where it is, the video is whole."""
        write(self._folders["refined"] / f"{key}.mp4", video)
        write(self._folders["refined"] / f"{key}.json", json.dumps(record, indent=1))

    def video_path(self, key: str) -> str:
        """Relative to the folder."""
        return f"refined/{key}.mp4"

    def finished(self) -> list[str]:
        """Of all candidates whose stage 1 is finished, by this run or an earlier one."""
        return sorted(path.stem for path in self._folders["records"].glob("[!.]*.json"))


def _read(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete it, and it is made again") from error

"""The files of videos, in a folder or an object store: each is written once, whole, and read by whoever needs it.

VIDEO/image.png, path.npz            what was asked for, checked and at the model's size
VIDEO/text.safetensors               features of the prompt
VIDEO/stage1/N, refined/N            latents of chunk N: from these a stage goes on that has lost its replica
VIDEO/video/begin.mp4, video/N.m4s   the video as it grows, in fragments
VIDEO/content.mp4, thumbnail.jpg     when it is whole
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import fsspec
from safetensors.torch import load, save
from torch import Tensor

from longtake.platform.store import files

STATE = "stage1", "refined", "text.safetensors"  # of a video, from which its stages go on
_LOOK_SECONDS = 0.5


class Results:
    """Below `uri`, a folder or s3://bucket/prefix."""

    def __init__(self, uri: str) -> None:
        options = {"use_listings_cache": False} if uri.startswith("s3://") else {}
        self._fs, root = fsspec.core.url_to_fs(uri, **options)
        self._root = str(root).rstrip("/")
        self.local = "file" in self._fs.protocol

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def put(self, name: str, data: bytes) -> None:
        if self.local:
            files.write(Path(self.path(name)), data)
        else:
            self._fs.pipe_file(self.path(name), data)

    def get(self, name: str) -> bytes:
        """FileNotFoundError when it is not there."""
        return self._fs.cat_file(self.path(name))

    def has(self, name: str) -> bool:
        return self._fs.exists(self.path(name))

    def gone(self, video: str) -> Callable[[], bool]:
        """What says whether a video's files were removed; it looks twice a second at most."""
        looked = there = time.monotonic()

        def look() -> bool:
            nonlocal looked, there
            if (now := time.monotonic()) - looked >= _LOOK_SECONDS:
                looked = now
                if self.has(f"{video}/image.png"):
                    there = now
            return there < looked

        return look

    def remove(self, folder: str) -> None:
        """What a stage writes there meanwhile may stay until it is removed again."""
        try:
            if self._fs.exists(self.path(folder)):
                self._fs.rm(self.path(folder), recursive=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise

    def copy(self, video: str, to: str, chunks: int) -> None:
        """What another video needs that goes on after so many chunks of this one."""
        self._copy(video, to, ["image.png", "path.npz", "text.safetensors"])
        self.lend(video, to, chunks)

    def lend(self, video: str, to: str, chunks: int) -> None:
        """The latents of the first chunks, to another video that begins like this one."""
        self._copy(video, to, [f"stage1/{number:05}" for number in range(chunks)])

    def _copy(self, video: str, to: str, names: Iterable[str]) -> None:
        for name in names:
            if self.has(f"{video}/{name}") and not self.has(f"{to}/{name}"):
                self.put(f"{to}/{name}", self.get(f"{video}/{name}"))

    def folders(self) -> list[str]:
        """Of videos."""
        try:
            return [os.path.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.put(name, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load(self.get(name))

    def numbered(self, folder: str, suffix: str = "") -> int:
        """How many of the files folder/00000, 00001... are there without a gap."""
        try:
            found = {os.path.basename(path) for path in self._fs.ls(self.path(folder), detail=False)}
        except FileNotFoundError:
            return 0
        count = 0
        while f"{count:05}{suffix}" in found:
            count += 1
        return count

    def latents(self, folder: str) -> list[Tensor]:
        """Of the chunks that are there."""
        return [self.tensors(f"{folder}/{number:05}")["latents"] for number in range(self.numbered(folder))]

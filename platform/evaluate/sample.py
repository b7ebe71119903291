"""What of a video is kept to be scored."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sample:
    """All frames of a short one, the first and last ten seconds of a long one."""

    most = 320

    def __init__(self, num_frames: int) -> None:
        self.whole = num_frames <= self.most
        half = self.most // 2
        kept = range(num_frames) if self.whole else (*range(half), *range(num_frames - half, num_frames))
        self.indices = np.array(kept)
        self._wanted = set(kept)
        self._kept: list[np.ndarray] = []

    def passing(self, chunks: Any) -> Any:
        """Hand `chunks` of frames on, keeping what is wanted of them."""
        index = 0
        for chunk in chunks:
            for frame in chunk:
                if index in self._wanted:
                    self._kept.append(frame)
                index += 1
            yield chunk

    def of(self, chunks: Any) -> Sample:
        for _ in self.passing(chunks):
            pass
        return self

    def frames(self) -> np.ndarray:
        return np.stack(self._kept)

"""All that a training worker is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longtake.model.config import WorldModelConfig
from longtake.platform.train.stages import Corpora, Stage


@dataclass(frozen=True)
class Settings:
    """A stage and the model it trains, where its clips come from, and where its results go (an absolute path).

    init: folder of weights of each part ("vae", "dit", "text", "refiner") that an earlier run trained.
    """

    stage: Stage
    config: WorldModelConfig
    data: Corpora
    run: str
    init: dict[str, str]
    workers: int = 1
    max_minutes: float | None = None

    @property
    def folder(self) -> Path:
        return Path(self.run)

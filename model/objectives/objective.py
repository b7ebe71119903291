"""What the training loop knows of an objective, and how it gets one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from longtake.model.config import WorldModelConfig
from longtake.model.dit.time_axis import WHOLE_CLIP, TimeAxis
from longtake.model.objectives.draws import Draws

Batch = dict[str, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]


class Objective(nn.Module, ABC):
    """A loss over the parameters that it trains.

    samples_pixels: whether `sample` gives frames, or latents. time_axis: which frames of a clip this process computes.
    rates: the learning rates of learners over the stage's, where they differ. frozen_from: what its frozen weights are,
    where checkpoints leave them out, so that a run that goes on must begin with the same; None where they hold them.
    """

    samples_pixels: ClassVar[bool] = False
    time_axis: TimeAxis = WHOLE_CLIP
    rates: Mapping[str, float] = {}
    frozen_from: str | None = None

    def learners(self) -> Mapping[str, nn.Module]:
        """What has an optimizer of its own, by name: modules that turn a batch into a loss as this one does."""
        return {"state": self}

    def turns(self, step: int) -> tuple[str, ...]:
        """Which of the learners make this step, one after another, each over the whole batch."""
        return ("state",)

    @property
    def exported(self) -> nn.Module:
        """What `export` writes: of this a moving average is kept."""
        return self

    @abstractmethod
    def forward(self, batch: Batch, draws: Draws) -> Loss:
        """The loss, and what else is worth logging."""

    @abstractmethod
    def sample(self, batch: Batch, draws: Draws) -> Tensor:
        """What the weights make of a batch, without gradients."""

    @abstractmethod
    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the trained parts into a weights folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Start from the parts in a weights folder."""

    def start(self, parts: Mapping[str, Path]) -> None:
        """Start from the weights folders that a run was given, by their parts."""
        if "dit" in parts:
            self.load(parts["dit"])


def build_objective(kind: str, config: WorldModelConfig, options: dict | None = None) -> Objective:
    """The objective called `kind` (a module of this folder) on the CPU, random; `load` and `start` give it weights."""
    # Imported by name: each brings along seconds of imports that the others have no use for.
    module = importlib.import_module(f"longtake.model.objectives.{kind}")
    return module.OBJECTIVE(config, **(options or {}))

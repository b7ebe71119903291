"""Denoising steps of few tokens, replayed: a step is some two thousand launches, which a CPU issues more slowly than a
GPU runs them. A CUDA graph issues them at once.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.model.capture import Turns, captured
from longtake.model.dit.time_axis import TimeAxis
from longtake.model.dit.world_model import Context, WorldModel

_MOST_TOKENS = 16_000  # of all clips; beyond them the GPU is the slower one
_MOST_BYTES = 2 << 30  # that a step reads beside the weights, of which there are two then
_MOST_SHAPES = 8  # of one network


class Replay:
    """`velocity` of a network whose weights stay where they are, whatever becomes of them, without gradients.

    The first step of a shape is captured, with buffers of its own for everything that it reads; later ones copy what
    has changed into them. Off a GPU, for more tokens, for a part of a clip or a padded one, and for chunks that see
    more of the past each time the network itself is called.
    """

    def __init__(self, model: WorldModel):
        self.model = model
        self._captured: dict[tuple, _Captured] = {}
        self._one_at_a_time = threading.Lock()  # the buffers are shared
        self._turns: Turns | None = None

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: Context) -> Tensor:
        """As `WorldModel.velocity`."""
        few = latents.is_cuda and latents[:, 0].numel() <= _MOST_TOKENS
        if not few or (form := context.at.time.form()) is None:
            return self.model.velocity(latents, timestep, context)
        inputs = _tensors((latents, timestep, context))
        if sum(x.nbytes for x in inputs) >= _MOST_BYTES:
            return self.model.velocity(latents, timestep, context)
        weights = next(self.model.parameters()).data_ptr()
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = weights, form, cast, *((x.shape, x.dtype, x.device) for x in inputs)
        with self._one_at_a_time, torch.cuda.device_of(latents), torch.inference_mode(False):
            known = self._captured.pop(key, None)
            if known is None:
                while len(self._captured) >= _MOST_SHAPES:
                    del self._captured[next(iter(self._captured))]  # the one that was used longest ago
                self._turns = self._turns or Turns()
                known = _Captured(self.model, latents, timestep, context, self._turns)
            self._captured[key] = known
            return known(inputs, context.at.time)


class _Captured:
    """Steps of one shape: those that leave something for later ones, and those that do not."""

    @torch.no_grad()
    def __init__(self, model: WorldModel, latents: Tensor, timestep: Tensor, context: Context, turns: Turns):
        self.model, self.turns = model, turns
        self.inputs = latents.clone(), timestep.clone(), copied(context)
        self.buffers = _tensors(self.inputs)
        self.copied: list[Any] = [None] * len(self.buffers)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor, TimeAxis]] = {}

    @torch.no_grad()
    def __call__(self, inputs: list[Tensor], time: TimeAxis) -> Tensor:
        self._copy_in(inputs)
        keep = time.left is not None
        if keep not in self.graphs:
            self.graphs[keep] = self._capture(keep)
        graph, output, axis = self.graphs[keep]
        graph.replay()
        if axis.left is not None:
            time.left = copied(axis.left)
        return output.clone()

    def _copy_in(self, values: list[Tensor]) -> None:
        for number, (buffer, value) in enumerate(zip(self.buffers, values, strict=True)):
            # Latents and times come first, and may have changed in place; what a context holds does not.
            if number < 2 or self.copied[number] is None or self.copied[number]() is not value:
                buffer.copy_(value)
                self.copied[number] = weakref.ref(value)

    def _capture(self, keep: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, TimeAxis]:
        latents, timestep, context = self.inputs
        time = context.at.time.reading(context.at.time.seen, keep)
        context = dataclasses.replace(context, at=dataclasses.replace(context.at, time=time))
        # Weights that were cast once and kept would stay as they are.
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            graph, output = captured(lambda: self.model.velocity(latents, timestep, context), self.turns)
        return graph, output, time


def _tensors(x: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, mappings and dataclasses, and what axes read, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, TimeAxis):
        x = x.seen
    if isinstance(x, Mapping):
        x = list(x.values())
    if dataclasses.is_dataclass(x):
        x = [getattr(x, field.name) for field in dataclasses.fields(x)]
    return [tensor for part in x for tensor in _tensors(part)] if isinstance(x, list | tuple) else []


def copied(x: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, TimeAxis):
        return x.reading(copied(x.seen), keep=False)
    if isinstance(x, Mapping):
        return {key: copied(part) for key, part in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(copied(part) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: copied(getattr(x, f.name)) for f in dataclasses.fields(x)})  # type: ignore[type-var]
    return x

"""Denoising steps of few tokens, replayed: a step is some two thousand launches, which a CPU issues more slowly than a
GPU runs them. A CUDA graph issues them at once.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from longtake.model.dit.time_axis import WHOLE_CLIP
from longtake.model.dit.world_model import Context, WorldModel

_MOST_TOKENS = 16_000  # of all clips; beyond them the GPU is the slower one


class Replay:
    """`velocity` of a network whose weights stay where they are, without gradients.

    The first step of a shape is captured, with buffers of its own for everything that it reads; later ones copy what
    has changed into them. Off a GPU, for more tokens, for a part of a clip or a padded one, and under autocast the
    network itself is called.
    """

    def __init__(self, model: WorldModel):
        self.model = model
        self._captured: dict[tuple, _Captured] = {}
        self._one_at_a_time = threading.Lock()  # the buffers are shared

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: Context) -> Tensor:
        """As `WorldModel.velocity`."""
        few = latents.is_cuda and latents[:, 0].numel() <= _MOST_TOKENS
        if not few or context.at.time is not WHOLE_CLIP or torch.is_autocast_enabled("cuda"):
            return self.model.velocity(latents, timestep, context)
        weights = next(self.model.parameters()).data_ptr()
        key = weights, *((x.shape, x.dtype, x.device) for x in _tensors((latents, timestep, context)))
        with self._one_at_a_time, torch.cuda.device_of(latents), torch.inference_mode(False):
            if key not in self._captured:
                if len(self._captured) > 3:
                    self._captured.clear()
                self._captured[key] = _Captured(self.model, latents, timestep, context)
            return self._captured[key](latents, timestep, context)


class _Captured:
    @torch.no_grad()
    def __init__(self, model: WorldModel, latents: Tensor, timestep: Tensor, context: Context):
        self.inputs = latents.clone(), timestep.clone(), _copy(context)
        self.context: Context | None = context
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.velocity(*self.inputs)  # compiles kernels and chooses among them, which nothing may do in a capture
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = model.velocity(*self.inputs)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor, context: Context) -> Tensor:
        changed = (latents, timestep) if context is self.context else (latents, timestep, context)
        for buffer, value in zip(_tensors(self.inputs), _tensors(changed), strict=False):
            buffer.copy_(value)
        self.context = context
        self.graph.replay()
        return self.output.clone()


def _tensors(x: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dataclasses, in order."""
    if isinstance(x, Tensor):
        return [x]
    if dataclasses.is_dataclass(x):
        x = [getattr(x, field.name) for field in dataclasses.fields(x)]
    return [tensor for part in x for tensor in _tensors(part)] if isinstance(x, list | tuple) else []


def _copy(x: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list | tuple):
        return type(x)(_copy(part) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: _copy(getattr(x, f.name)) for f in dataclasses.fields(x)})  # type: ignore[type-var]
    return x

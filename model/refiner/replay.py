"""Passes over a refiner's block beside a full window, replayed: with weights in float8 a GPU computes them faster than
a CPU issues their thousands of launches. A CUDA graph issues those of a pass at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.model.capture import captured
from longtake.model.refiner.network import KeysValues, Reading

Velocity = Callable[[Tensor, Tensor], Tensor]


class Replay:
    """velocity(latents, timestep, reading) of a refiner whose weights stay where they are, with one set of buffers for
    everything that a pass reads: the keys and values of a whole window, too, which one block at a time fills.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Reading], Tensor], weights: nn.Module):
        self.velocity, self.weights = velocity, weights
        self._key: tuple | None = None
        self._captured: Any = None
        self._one_at_a_time = threading.Lock()  # the buffers are shared

    @contextmanager
    def block(self, latents: Tensor, reading: Reading, window: int) -> Iterator[tuple[Velocity, list[KeysValues]]]:
        """Passes over latents (B, C, t, h, w) beside `window` tokens, their own included; and of each of the network's
        blocks the room for keys and values of all, (B, window, H, D), which the passes read, and fill at their end.
        """
        text_keys, weights = reading.text_keys, next(self.weights.parameters())
        assert text_keys, "a pass replayed is not the first of its video"
        (k, _), (cos, _) = text_keys[0], reading.rotation
        mask = None if reading.mask is None else reading.mask.shape
        key = weights.data_ptr(), latents.shape, latents.dtype, cos.shape, k.shape, mask, window
        with self._one_at_a_time, torch.cuda.device_of(latents), torch.inference_mode(False):
            if key != self._key:
                self._captured, self._key = None, None  # gives up its memory before the next one takes its own
                self._captured, self._key = _Captured(self.velocity, latents, reading, window), key
            self._captured.take(reading)
            yield self._captured, self._captured.rooms


class _Captured:
    @torch.no_grad()
    def __init__(
        self, velocity: Callable[[Tensor, Tensor, Reading], Tensor], latents: Tensor, reading: Reading, window: int
    ):
        self.compute = velocity
        self.graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self.latents, self.timestep = latents.clone(), latents.new_zeros(len(latents), latents.shape[2])
        assert reading.text_keys is not None
        k, _ = reading.text_keys[0]
        new = [k.new_zeros(len(latents), window, *k.shape[2:]) for _ in range(2 * len(reading.text_keys))]
        self.rooms: list[KeysValues] = list(zip(new[::2], new[1::2], strict=True))
        self.reading = replace(
            reading,
            mask=None if reading.mask is None else reading.mask.clone(),
            rotation=_copies(reading.rotation),
            text_keys={number: _copies(each) for number, each in reading.text_keys.items()},
            before=self.rooms,
        )
        self._text: Any = lambda: None  # whose the text's keys are

    def take(self, reading: Reading) -> None:
        """What the next passes read beside their latents."""
        assert reading.text_keys is not None and self.reading.text_keys is not None
        _into(self.reading.rotation, reading.rotation)
        if self._text() is reading.text_keys[0][0]:
            return
        if self.reading.mask is not None and reading.mask is not None:
            self.reading.mask.copy_(reading.mask)
        for number, each in reading.text_keys.items():
            _into(self.reading.text_keys[number], each)
        self._text = weakref.ref(reading.text_keys[0][0])

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)
        if self.graph is None:
            self.graph = captured(lambda: self.compute(self.latents, self.timestep, self.reading))
        graph, output = self.graph
        graph.replay()
        return output.clone()


def _copies(each: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return each[0].clone(), each[1].clone()


def _into(buffers: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)

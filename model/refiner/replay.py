"""Passes over a refiner's blocks, replayed: with weights in float8 a GPU computes them faster than a CPU issues their
thousands of launches. A CUDA graph issues those of a pass at once.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longtake.model.capture import Turns, captured
from longtake.model.dit.replay import copied
from longtake.model.refiner.network import KeysValues, Reading

Velocity = Callable[[Tensor, Tensor], Tensor]


class Replay:
    """velocity(latents, timestep, reading) of a refiner whose weights stay where they are, with one set of buffers for
    everything that a pass reads: the keys and values of a window, too, which one block at a time fills.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._passes: Any = None
        self._one_at_a_time = threading.Lock()  # the buffers are shared, by threads
        self._done: Any = None  # and by CUDA streams: what the last block does with them

    def __reduce__(self) -> tuple:
        return Replay, ()

    @contextmanager
    def block(
        self, refiner: Any, latents: Tensor, reading: Reading, sink: KeysValues, seen: int, most: int
    ) -> Iterator[tuple[Velocity, list[KeysValues]]]:
        """Passes over latents (B, C, t, h, w) that see so many tokens, their own included, of at most `most`; and of
        each of the network's blocks the room for keys and values of these, like the sink's, (B, seen, H, D), which the
        passes read, and fill at their end.
        """
        text_keys, weights = reading.text_keys, next(refiner.parameters())
        assert text_keys, "a pass replayed is not the first of its video"
        mask = None if reading.mask is None else reading.mask.shape
        kinds = latents.shape, latents.dtype, sink[0].dtype, text_keys[0][0].dtype, text_keys[0][0].shape, mask, most
        key = weights.data_ptr(), torch.is_autocast_enabled(latents.device.type), *kinds
        with self._one_at_a_time, torch.cuda.device_of(latents), torch.inference_mode(False):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            if key != self._key:
                self._passes, self._key = None, None  # gives up its memory before others take theirs
                self._passes, self._key = _Passes(latents, reading, sink, most), key
            try:
                self._passes.take(reading)
                yield functools.partial(self._passes.velocity, refiner, seen), self._passes.rooms_of(seen)
            finally:
                self._done = torch.cuda.current_stream().record_event() if latents.is_cuda else None


class _Passes:
    """Those over blocks of one shape: a graph for each number of tokens that they see."""

    @torch.no_grad()
    def __init__(self, latents: Tensor, reading: Reading, sink: KeysValues, most: int):
        assert reading.text_keys is not None
        self.latents, self.timestep = latents.clone(), latents.new_zeros(len(latents), latents.shape[2])
        k, _ = sink
        new = [k.new_zeros(len(k), most, *k.shape[2:]) for _ in range(2 * len(reading.text_keys))]
        self.rooms: list[KeysValues] = list(zip(new[::2], new[1::2], strict=True))
        self.reading = copied(reading)
        self._text: Any = lambda: None  # whose the text's keys are
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._turns: Any = Turns() if latents.is_cuda else None

    def rooms_of(self, seen: int) -> list[KeysValues]:
        return [(k[:, -seen:], v[:, -seen:]) for k, v in self.rooms]

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
    def velocity(self, refiner: Any, seen: int, latents: Tensor, timestep: Tensor) -> Tensor:
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)
        if seen not in self.graphs:
            reading = replace(self.reading, before=self.rooms_of(seen))
            compute = functools.partial(refiner.velocity, self.latents, self.timestep, reading)
            self.graphs[seen] = captured(compute, self._turns)
        graph, output = self.graphs[seen]
        graph.replay()
        return output.clone()


def _into(buffers: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)

"""The second stage: refines stage-1 latents in a few steps from a truncated sigma (SANA-WM section 3.4).

The first latent frame is the sink: it is never changed, and all others see it. The others are denoised jointly, or in
blocks, each seeing the sink and the last refined frames before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from longtake.model.config import WorldModelConfig
from longtake.model.float8 import Float8Linear
from longtake.model.refiner.blockwise import SINK, Blocks
from longtake.model.refiner.network import KeysValues, Reading, Rotation, VideoTransformer, rotated
from longtake.model.refiner.replay import Replay, Velocity
from longtake.model.samplers.flow_euler import euler


class Refiner(nn.Module):
    """refiner(latents (B, C, T, h, w), timestep (B, T) in [0, 1000], text (B, L, D), text_mask (B, L)) -> velocity of
    whole clips.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        spec = config.refiner
        self.fps, self.stride, self.sigmas = config.fps, config.vae_stride, spec.sigmas
        self.block_size, self.window = spec.block_size, spec.window
        self.transformer = VideoTransformer(
            config.latent_channels, spec.num_heads, spec.head_dim, spec.num_layers, spec.text_dim
        )
        self.replay: Replay | None = None

    def replay_rounded(self) -> None:
        """Of weights in float8, which stay where they are, replay passes over blocks, on a GPU. Others keep it busy for
        longer than a CPU takes to issue them, and replayed ones hold one more window of keys and values.
        """
        rounded = any(isinstance(layer, Float8Linear) for layer in self.transformer.modules())
        self.replay = Replay() if rounded and self.transformer.proj_in.weight.is_cuda else None

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self.velocity(latents, timestep, self.reading(latents, text, real(text_mask)))

    def by_blocks(self, clean: Tensor, noisy: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """As `forward`, for training a refiner of blocks: of `noisy` blocks each as `RefinerStream` sees it after the
        `clean` frames before it. The first frame's, which is clean, is zero.
        """
        assert self.block_size is not None
        frames, area = clean.shape[2], clean.shape[3] * clean.shape[4]
        blocks = Blocks(block_sizes(frames - SINK, self.block_size), self.window, area)
        latents = torch.cat([clean[:, :, : blocks.clean], noisy[:, :, SINK:]], 2)
        reading = self.reading(latents, text, real(text_mask))
        reading.rotation, reading.attention = self.places(blocks.places, latents), blocks
        timestep = torch.cat([torch.zeros_like(timestep[:, : blocks.clean]), timestep[:, SINK:]], 1)
        velocity = self.velocity(latents, timestep, reading)[:, :, blocks.clean :]
        return torch.cat([torch.zeros_like(velocity[:, :, :SINK]), velocity], 2)

    def velocity(self, latents: Tensor, timestep: Tensor, reading: Reading) -> Tensor:
        """As `forward`, of the frames and beside the text that `reading` was made for."""
        _, _, frames, height, _ = latents.shape
        velocity = self.transformer(rearrange(latents, "b c t h w -> b (t h w) c"), timestep, reading)
        return rearrange(velocity, "b (t h w) c -> b c t h w", t=frames, h=height)

    def reading(self, latents: Tensor, text: Tensor, mask: Tensor | None, first: int = 0) -> Reading:
        """What latents (B, C, T, h, w), whose first frame is number `first` of its video, read of text and places;
        mask: `Reading`'s.
        """
        return Reading(text, mask, self.places(range(first, first + latents.shape[2]), latents))

    def places(self, frames: Sequence[int], latents: Tensor) -> Rotation:
        """Of these frames of the video that `latents` is a part of."""
        height, width = latents.shape[3:]
        return self.transformer.rotation(frames, height, width, self.fps, self.stride, latents.device)

    @torch.no_grad()
    def refine(self, latents: Tensor, noise: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Refine stage-1 latents (B, C, T, h, w) from x = (1 - sigma_0) latents + sigma_0 noise down the schedule, as
        the weights were made for: all frames jointly, or block by block.
        """
        if self.block_size is not None:
            sizes = [SINK, *block_sizes(latents.shape[2] - SINK, self.block_size)]
            parts = iter(noise.split(sizes, 2)[1:])
            return torch.cat(list(RefinerStream(self, text, text_mask, lambda number, x: next(parts))([latents])), 2)
        reading = self.reading(latents, text, real(text_mask))
        reading.text_keys = {}
        return self._denoised(latents, noise, functools.partial(self.velocity, reading=reading), SINK)

    def _denoised(self, latents: Tensor, noise: Tensor, velocity: Velocity, frozen: int) -> Tensor:
        start = (1 - self.sigmas[0]) * latents + self.sigmas[0] * noise
        start[:, :, :frozen] = latents[:, :, :frozen]
        return euler(velocity, start, self.sigmas, frozen)


def real(text_mask: Tensor) -> Tensor | None:
    """What a `Reading` has for a mask (B, L). To know it a CPU waits until the GPU has done all that it was given."""
    return None if text_mask.all() else text_mask.bool()[:, None, None]


def block_sizes(frames: int, size: int) -> list[int]:
    """Of the blocks of so many frames after the sink: what remains is the last one's."""
    return [min(size, frames - first) for first in range(0, frames, size)]


@dataclass(frozen=True)
class RefinerPast:
    """What a refined video leaves for its next block; nothing changes one.

    frames: latent frames so far. sink: of each block of the network, the sink's keys before their rotation, and its
    values; history: keys and values of the last refined frames, `length` of them.
    """

    frames: int = 0
    sink: tuple[KeysValues, ...] = ()
    history: tuple[KeysValues, ...] = ()
    length: int = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in (*self.sink, *self.history) for x in pair)


class RefinerStream:
    """Refines videos (B clips of one length) as their latents come, in memory that does not grow with their length.

    noise(number, latents): unit noise like the latents of block `number`, the first after the sink being 0. known: the
    first blocks, as they were refined before; they take one pass each.
    """

    def __init__(
        self,
        refiner: Refiner,
        text: Tensor,
        text_mask: Tensor,
        noise: Callable[[int, Tensor], Tensor] = lambda number, latents: torch.randn_like(latents),
        past: RefinerPast | None = None,
        known: Sequence[Tensor] = (),
    ):
        self.refiner, self.noise, self.past, self.known = refiner, noise, past or RefinerPast(), known
        self._text, self._mask = text, real(text_mask)
        self._text_keys: dict[int, KeysValues] = {}
        self._waiting: Tensor | None = None
        self._number = 0

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The sink, then the refined blocks, of a video that comes in parts (B, C, t, h, w) of any length."""
        for part in parts:
            yield from self.take(part)
        yield from self.rest()

    def take(self, part: Tensor) -> Iterator[Tensor]:
        """What can be refined now that this part (B, C, t, h, w) of a video is there."""
        size = self.refiner.block_size or 1
        self._waiting = part if self._waiting is None else torch.cat([self._waiting, part], 2)
        if not self.past.frames:
            sink, self._waiting = self._waiting[:, :, :SINK], self._waiting[:, :, SINK:]
            self.begin(sink)
            yield sink
        while self._waiting.shape[2] >= size:
            block, self._waiting = self._waiting[:, :, :size], self._waiting[:, :, size:]
            yield self._next(block)

    def rest(self) -> Iterator[Tensor]:
        """The last block, where the video does not end with a whole one."""
        if self._waiting is not None and self._waiting.shape[2]:
            block, self._waiting = self._waiting, None
            yield self._next(block)

    def _next(self, latents: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        if number >= len(self.known):
            return self.refine(latents, self.noise(number, latents))
        self.recall(self.known[number])
        return self.known[number]

    @torch.no_grad()
    def begin(self, sink: Tensor) -> None:
        """Read the sink, (B, C, 1, h, w)."""
        reading = self._reading(sink)
        reading.plain = []
        self.refiner.velocity(sink, sink.new_zeros(len(sink), SINK), reading)
        self.past = RefinerPast(SINK, tuple(reading.plain))

    @torch.no_grad()
    def refine(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The refined next block of these latents (B, C, t, h, w), from which later ones go on."""
        with self._going_on(latents) as (velocity, before):
            refined = self.refiner._denoised(latents, noise, velocity, 0)
            self._keep(refined, velocity, before)
        return refined

    @torch.no_grad()
    def recall(self, refined: Tensor) -> None:
        """Go on after a next block (B, C, t, h, w) that was refined before."""
        with self._going_on(refined) as (velocity, before):
            self._keep(refined, velocity, before)

    @contextmanager
    def _going_on(self, latents: Tensor) -> Iterator[tuple[Velocity, list[KeysValues]]]:
        """Passes over the block that comes next, and keys and values of what is before it, with room for it."""
        refiner, frames, reading = self.refiner, latents.shape[2], self._reading(latents)
        # The sink moves along, so that it is right before the history.
        before = self.past.frames - self.past.length - SINK
        there = refiner.places(range(before, before + SINK), latents)
        area = latents.shape[3] * latents.shape[4]
        if refiner.replay is not None and frames == refiner.block_size and self._text_keys:
            seen, most = SINK + self.past.length + frames, refiner.window + frames
            given = latents, reading, self.past.sink[0], seen * area, most * area
            with refiner.replay.block(refiner, *given) as (velocity, rooms):
                for number, room in enumerate(rooms):
                    _fill(room, self._seen(number, there, self.past.history))
                yield velocity, rooms
            return
        reading.before = []
        history = list(self.past.history)
        # The history lies in what is made here, too: from there it is read from now on, so that it is held once.
        self.past = replace(self.past, history=())
        try:
            for number in range(len(self.past.sink)):
                reading.before.append(_with_room(self._seen(number, there, history), frames * area))
                if history:
                    history[number] = _between(reading.before[-1], SINK * area, frames * area)
        finally:
            self.past = replace(self.past, history=tuple(history))
        yield functools.partial(refiner.velocity, reading=reading), reading.before

    def _seen(self, number: int, there: Rotation, history: Sequence[KeysValues]) -> list[KeysValues]:
        """What one of the network's blocks sees of the past: the sink, turned, and the history, if there is any."""
        k, v = self.past.sink[number]
        return [(rotated(k, there), v), *history[number : number + 1]]

    def _keep(self, refined: Tensor, velocity: Velocity, before: list[KeysValues]) -> None:
        past, frames = self.past, refined.shape[2]
        area = refined.shape[3] * refined.shape[4]
        velocity(refined, refined.new_zeros(len(refined), frames))  # leaves its keys and values
        length = min(past.length + frames, self.refiner.window - SINK)
        history = (_between(each, each[0].shape[1] - length * area) for each in before)
        self.past = past = RefinerPast(past.frames + frames, past.sink)  # the one before gives up its memory first
        if self.refiner.replay is not None:
            history = ((k.clone(), v.clone()) for k, v in history)  # other videos' will take its place
        self.past = replace(past, history=tuple(history), length=length)

    def _reading(self, latents: Tensor) -> Reading:
        """Of the frames that come next."""
        reading = self.refiner.reading(latents, self._text, self._mask, self.past.frames)
        reading.text_keys = self._text_keys
        return reading


def _between(each: KeysValues, first: int, last: int = 0) -> KeysValues:
    """Without the first and the last tokens; nothing is copied."""
    k, v = each
    tokens = slice(first, k.shape[1] - last)
    return k[:, tokens], v[:, tokens]


def _with_room(parts: Sequence[KeysValues], tokens: int) -> KeysValues:
    """Keys and values one after another, followed by room for so many tokens."""
    length, (k, v) = sum(k.shape[1] for k, _ in parts), parts[0]
    shape = len(k), length + tokens, *k.shape[2:]
    room = k.new_empty(shape), v.new_empty(shape)
    _fill(room, parts)
    return room


def _fill(room: KeysValues, parts: Sequence[KeysValues]) -> None:
    """Put keys and values one after another where there is room."""
    for whole, each in zip(room, zip(*parts, strict=True), strict=True):
        torch.cat(each, 1, out=whole[:, : sum(x.shape[1] for x in each)])

"""A world model that makes a video chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from longtake.model.camera import CameraFeatures
from longtake.model.dit.chunk_causal import ChunkCausal
from longtake.model.dit.replay import Replay
from longtake.model.dit.world_model import Context, OfRays, WorldModel
from longtake.model.state import StreamState, joined, together


class ChunkStream:
    """A chunk-causal network with one text, and the chunks that it has kept.

    camera: of the frames that will be asked for. negative: features and mask of the text that guidance moves away from.
    replay: of the model, which passes without gradients then go through.
    """

    def __init__(
        self,
        model: WorldModel,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None = None,
        negative: tuple[Tensor, Tensor] | None = None,
        replay: Replay | None = None,
    ):
        self.model, self._run, self.camera, self._camera_from = model, replay or model, camera, 0
        self._go_on(StreamState())
        self.guidance = 1.0 if negative is None else model.config.sampler.guidance_scale
        if negative is not None:
            text, text_mask = torch.cat([negative[0], text]), torch.cat([negative[1], text_mask])
        self.features = text
        with torch.no_grad():
            self.text, self.mask = model.read_text(text, of_sample=True), text_mask
        self._of_rays = model.of_rays()

    def going_on(self, state: StreamState, camera: CameraFeatures | None) -> ChunkStream:
        """The same text after other chunks, with the camera of the frames that follow them."""
        other = copy(self)
        other.camera, other._camera_from = camera, state.frames
        other._go_on(state)
        return other

    @staticmethod
    def together(streams: Sequence[ChunkStream], camera: CameraFeatures | None) -> ChunkStream:
        """Several networks of one clip each, of one model and of equal places in their videos, as one of all of them,
        with the camera of the frames that follow.
        """
        first = streams[0]
        if len(streams) == 1:
            return first.going_on(first.state, camera)
        one = copy(first)
        one.features = joined([each.features for each in streams])
        one.mask = joined([each.mask for each in streams])
        texts = zip(*(each.text for each in streams), strict=True)
        one.text = [(joined([k for k, _ in block]), joined([v for _, v in block])) for block in texts]
        return one.going_on(together([each.state for each in streams], first.model.config.chunk_window), camera)

    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of chunks of `sizes` latent frames after the kept ones: x (B, C, T, h, w), timestep (B, T)."""
        velocity = self._pass(x, timestep, self._context_of(x, sizes))
        if self.guidance == 1:
            return velocity
        without, conditional = velocity.chunk(2)
        return without + self.guidance * (conditional - without)

    def trained_velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `velocity`, without guidance. Gradients go to the network, but not through the chunks that it kept."""
        assert self.guidance == 1
        # What is computed again in the backward pass needs no more of the past than it reads.
        axis = self._axis_of(sizes)
        context = self._placed(x, self.model.read_text(self.features), axis.reading(axis.seen, keep=False))
        return self.model.velocity(x, timestep, context)

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        """x is what these chunks became: one more pass, of clean frames, leaves the state of what follows."""
        context, axis = self._context_of(x, sizes), self._axis_of(sizes).keeping()
        context = dataclasses.replace(context, at=dataclasses.replace(context.at, time=axis))
        self._pass(x, x.new_zeros(len(x), x.shape[2]), context)
        self._go_on(axis.after())

    @torch.no_grad()
    def _pass(self, x: Tensor, timestep: Tensor, context: Context) -> Tensor:
        if self.guidance != 1:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        return self._run.velocity(x, timestep, context)

    def _go_on(self, state: StreamState) -> None:
        self.state = state
        # Of the passes over the chunks that follow, until they are kept.
        self._axis: ChunkCausal | None = None
        self._context: Context | None = None

    @torch.no_grad()
    def _axis_of(self, sizes: Sequence[int]) -> ChunkCausal:
        if self._axis is None or self._axis.sizes != list(sizes):
            self._axis = ChunkCausal(sizes, self.model.config.chunk_window, self.state, self.model.rotary)
            self._axis.seen = self.model.of_past(self._axis.seen)
            self._context = None
        return self._axis

    @torch.no_grad()
    def _context_of(self, x: Tensor, sizes: Sequence[int]) -> Context:
        axis = self._axis_of(sizes)
        if self._context is None:
            self._context = self._placed(x, self.text, axis, self._of_rays)
        return self._context

    def _placed(
        self,
        x: Tensor,
        text: Tensor | list[tuple[Tensor, Tensor]],
        axis: ChunkCausal,
        of_rays: OfRays | None = None,
    ) -> Context:
        grid = tuple(x.shape[2:])
        return self.model.placed(text, self.mask, grid, self._camera(grid[0]), axis, of_rays=of_rays)

    def _camera(self, frames: int) -> CameraFeatures | None:
        """Of the next latent frames of the video."""
        if self.camera is None:
            return None
        start = self.state.frames - self._camera_from
        stop = start + frames
        if (known := self.camera.conditions.shape[1]) < stop:
            raise ValueError(f"the camera has {known} latent frames, {stop} are needed")
        camera = self.camera.frames(start, stop)
        return CameraFeatures.cat([camera] * (len(self.mask) // len(camera.conditions)))  # guidance: twice

"""A world model that makes a video chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from longtake.model.camera import CameraFeatures
from longtake.model.dit.chunk_causal import ChunkCausal
from longtake.model.dit.world_model import Context, WorldModel
from longtake.model.state import StreamState


class ChunkStream:
    """A chunk-causal network with one text, and the chunks that it has kept.

    camera: of the frames that will be asked for. negative: features and mask of the text that guidance moves away from.
    """

    def __init__(
        self,
        model: WorldModel,
        text: Tensor,
        text_mask: Tensor,
        camera: CameraFeatures | None = None,
        negative: tuple[Tensor, Tensor] | None = None,
    ):
        self.model, self.camera, self.state, self._camera_from = model, camera, StreamState(), 0
        self.guidance = 1.0 if negative is None else model.config.sampler.guidance_scale
        if negative is not None:
            text, text_mask = torch.cat([negative[0], text]), torch.cat([negative[1], text_mask])
        self.features = text
        with torch.no_grad():
            self.text, self.mask = model.read_text(text, of_sample=True), text_mask
        self._placed: tuple[tuple, Context] | None = None  # of the newest frames that were asked for

    def going_on(self, state: StreamState, camera: CameraFeatures | None) -> ChunkStream:
        """The same text after other chunks, with the camera of the frames that follow them."""
        other = copy(self)
        other.state, other.camera, other._camera_from, other._placed = state, camera, state.frames, None
        return other

    @torch.no_grad()
    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of chunks of `sizes` latent frames after the kept ones: x (B, C, T, h, w), timestep (B, T)."""
        velocity = self._pass(x, timestep, sizes)[0]
        if self.guidance == 1:
            return velocity
        without, conditional = velocity.chunk(2)
        return without + self.guidance * (conditional - without)

    def trained_velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `velocity`, without guidance. Gradients go to the network, but not through the chunks that it kept."""
        assert self.guidance == 1
        axis = ChunkCausal(sizes, self.model.config.chunk_window, self.state)
        text, grid = self.model.read_text(self.features), tuple(x.shape[2:])
        context = self.model.placed(text, self.mask, grid, self._camera(*axis.place(grid[0])), axis)
        return self.model.velocity(x, timestep, context)

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        """x is what these chunks became: one more pass, of clean frames, leaves the state of what follows."""
        self.state = self._pass(x, x.new_zeros(len(x), x.shape[2]), sizes)[1].after()

    @torch.no_grad()
    def _pass(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ChunkCausal]:
        axis = ChunkCausal(sizes, self.model.config.chunk_window, self.state)
        context = self._context(tuple(x.shape[2:]), axis)
        if self.guidance != 1:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        return self.model.velocity(x, timestep, context), axis

    def _context(self, grid: tuple[int, ...], axis: ChunkCausal) -> Context:
        """Of the frames on the axis; what does not change between passes over them is made once."""
        first, end = axis.place(grid[0])
        key = (first, *grid)
        if self._placed is None or self._placed[0] != key:
            self._placed = key, self.model.placed(self.text, self.mask, grid, self._camera(first, end), axis)
        context = self._placed[1]
        return dataclasses.replace(context, at=dataclasses.replace(context.at, time=axis))

    def _camera(self, first: int, end: int) -> CameraFeatures | None:
        """Of these latent frames of the video."""
        if self.camera is None:
            return None
        start, stop = first - self._camera_from, end - self._camera_from
        if (known := self.camera.conditions.shape[1]) < stop:
            raise ValueError(f"the camera has {known} latent frames, {stop} are needed")
        camera = self.camera.frames(start, stop)
        return CameraFeatures.cat([camera] * (len(self.mask) // len(camera.conditions)))  # guidance: twice

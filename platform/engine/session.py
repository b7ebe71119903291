"""A session: one video that goes on for as long as someone steers it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from longtake.model.camera import Motion, Steering, actions_length, intrinsics_from_fov
from longtake.model.camera.features import CameraFeatures, camera_features
from longtake.model.pipeline import ImageInput, WorldPipeline
from longtake.model.samplers.chunk_flow import chunk_noise
from longtake.model.samplers.flow_euler import euler, sampler_sigmas
from longtake.model.state import StreamState, apart
from longtake.model.stream import ChunkStream
from longtake.model.vae import decode_more

_FORMAT = 4  # of snapshots


Actions = str | Tensor  # of a chunk: keys, or poses


class SessionStopped(Exception):
    """A chunk was given up between two of its steps; the session is as it was before."""


@dataclass(frozen=True)
class Chunk:
    """What one step made. latents (1, C, t, h, w); frames uint8 (f, H, W, 3), the first chunk's begin with the image,
    and none of a session that does not decode; actions: those that were used; c2w (f, 4, 4): their poses, from the
    session's first camera.
    """

    number: int
    latents: Tensor
    frames: np.ndarray
    actions: str
    c2w: Tensor


@dataclass(frozen=True)
class _Past:
    """All that changes in a session; never changed itself."""

    stream: StreamState = StreamState()
    video: dict[str, Tensor] = field(default_factory=dict)
    motion: Motion = Motion()


@dataclass(frozen=True)
class _Asked:
    """What a session is to make next, after `past`."""

    session: Session
    past: _Past
    actions: str
    camera: CameraFeatures
    noise: Tensor
    poses: Tensor
    motion: Motion
    stop: Callable[[], bool] | None
    known: Tensor | None

    def stopped(self) -> SessionStopped | None:
        if self.stop is None or not self.stop():
            return None
        return SessionStopped(f"chunk {self.past.stream.chunks} was stopped")


class Session:
    """A video from an image and a caption. Its chunks depend on these, the seed and the actions alone.

    A step either succeeds and is kept, or the session stays as it was. fov_deg: horizontal field of view; intrinsics
    (4,), in pixels of images of the model's size, in its place; steering: what the keys do, at the model's frames a
    second. text: features and mask of the caption, where somebody has read it. decode: whether chunks have frames.
    ValueError for weights that cannot go on, and for a bad image.
    """

    def __init__(
        self,
        pipeline: WorldPipeline,
        image: ImageInput,
        caption: str = "",
        seed: int = 0,
        fov_deg: float = 75.0,
        steering: Steering | None = None,
        text: tuple[Tensor, Tensor] | None = None,
        intrinsics: Tensor | None = None,
        decode: bool = True,
    ):
        config = pipeline.config
        _check(pipeline, ("vae", "dit") if text is not None else ("text", "vae", "dit"))
        steering = Steering(config.key_map, config.fps) if steering is None else steering
        intrinsics = intrinsics_from_fov(fov_deg, config.image_size) if intrinsics is None else intrinsics
        text = pipeline.encode_text([caption]) if text is None else text
        self._begin(pipeline, pipeline.encode_image(image), *text, seed, intrinsics, steering, decode)

    def _begin(
        self,
        pipeline: WorldPipeline,
        image: Tensor,
        text: Tensor,
        mask: Tensor,
        seed: int,
        intrinsics: Tensor,
        steering: Steering,
        decode: bool,
    ) -> None:
        self._pipeline, self._image, self._text, self._mask = pipeline, image, text, mask
        self._seed, self._intrinsics, self._steering, self._decode = seed, intrinsics, steering, decode
        self._past = _Past()
        dit: Any = pipeline.part("dit")
        self._network = ChunkStream(dit, text, mask, negative=pipeline.negative, replay=pipeline.replay)

    @property
    def frames(self) -> int:
        """Of the video so far."""
        latents, stride = self._past.stream.frames, self._pipeline.config.vae_stride[0]
        return stride * (latents - 1) + 1 if latents else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the session's past takes on its device; constant after the first few chunks, where the model's
        window is bounded.
        """
        return self._past.stream.nbytes + sum(tensor.nbytes for tensor in self._past.video.values())

    @property
    def actions_per_chunk(self) -> int:
        """Frames of actions that one step takes."""
        return self._pipeline.config.frames_per_chunk

    def step(self, actions: Actions = "", stop: Callable[[], bool] | None = None, known: Tensor | None = None) -> Chunk:
        """The next chunk, in which the camera does what `actions` say, such as "w-16,dw-8", and then holds its keys
        up; nothing holds them up all the time. Or it goes where poses (f, 4, 4) say, all of a chunk's frames, seen from
        the session's first camera.

        stop: asked before each step of the sampler; when it says so, SessionStopped. known: latents (1, C, t, h, w)
        that the chunk had when it was made before, with the same actions: it is only kept, in one pass. ValueError for
        actions that are wrong or longer than a chunk, and after the last position of a model whose window is not
        bounded.
        """
        (made,) = step_together([Step(self, actions, stop, known)])
        if isinstance(made, BaseException):
            raise made
        return made

    def place(self) -> tuple:
        """Sessions of one pipeline of which this is equal can make their next chunks together."""
        return self._past.stream.place(self._pipeline.config.chunk_window)

    def _asked(self, step: Step) -> _Asked:
        config, stream = self._pipeline.config, self._past.stream
        poses, motion, actions = self._led(step.actions)
        # Features are relative to the first camera, which stands where no keys were held.
        path = torch.cat([torch.eye(4)[None], poses])
        pinholes = self._intrinsics.expand(1, len(path), 4)
        camera = camera_features(path[None], pinholes, config.image_size, config.vae_stride)
        length = camera.conditions.shape[1] - (1 if stream.frames else 0)
        if (most := config.most_latent_frames) is not None and stream.frames + length > most:
            raise ValueError(f"the model knows {most} latent frames, and the session has had {stream.frames}: reset it")
        camera = camera.frames(1, length + 1) if stream.frames else camera
        noise = self._noise(self._past, length)
        if not stream.frames:
            noise[:, :, :1] = self._image
        if step.known is not None and step.known.shape != noise.shape:
            raise ValueError(f"known latents have shape {tuple(step.known.shape)}: the chunk has {tuple(noise.shape)}")
        poses = poses if stream.frames else path
        return _Asked(self, self._past, actions, camera, noise, poses, motion, step.stop, step.known)

    def _led(self, actions: Actions) -> tuple[Tensor, Motion, str]:
        """The poses of a chunk, how the camera moves after it, and the actions that were used, if these led it."""
        if isinstance(actions, Tensor):
            if actions.shape != (self.actions_per_chunk, 4, 4):
                raise ValueError(f"poses of a chunk are ({self.actions_per_chunk}, 4, 4), not {tuple(actions.shape)}")
            if not actions.isfinite().all():
                raise ValueError("poses must be finite numbers")
            return actions, self._past.motion, ""
        actions = self._filled(actions)
        return *self._steering.move(actions, self._past.motion), actions

    def _noise(self, past: _Past, length: int, step: int = 0) -> Tensor:
        """Of the chunk of so many latent frames after `past`."""
        shape = self._image.shape[1], length, *self._image.shape[3:]
        return chunk_noise(shape, [self._seed], past.stream.chunks, self._pipeline.device, step)

    def _commit(self, asked: _Asked, latents: Tensor, stream: StreamState) -> Chunk:
        """The chunk, which from here on is of the session's past. ValueError when it is no video."""
        before = asked.past.stream
        if not latents.isfinite().all():
            raise ValueError(f"these weights diverge after {before.frames} latent frames: reset the session")
        images, video = np.empty((0, *self._pipeline.config.image_size, 3), np.uint8), asked.past.video
        if self._decode:
            frames, video = decode_more(self._pipeline.part("vae"), latents, video)  # type: ignore[arg-type]
            images = frames[0].cpu().numpy()
        self._past = _Past(stream, video, asked.motion)
        return Chunk(before.chunks, latents, images, asked.actions, asked.poses)

    def _filled(self, actions: str) -> str:
        """The actions, then no keys for the rest of a chunk."""
        length = actions_length(actions) if actions else 0
        if length > self.actions_per_chunk:
            raise ValueError(f"{length} frames of actions are more than a chunk's {self.actions_per_chunk}: give fewer")
        rest = self.actions_per_chunk - length
        return ",".join([*([actions] if actions else []), *([f"none-{rest}"] if rest else [])])

    def clone(self) -> Session:
        """One that goes on from here by itself; what both have had is not copied."""
        return copy(self)

    def reset(self) -> None:
        """To the beginning, the image."""
        self._past = _Past()

    def snapshot(self) -> bytes:
        """All of the session but the weights, which `restore` turns into one again, in this process or another: a
        safetensors file.
        """
        stream = self._past.stream
        tensors = {"image": self._image, "text": self._text, "mask": self._mask, "intrinsics": self._intrinsics}
        tensors |= {f"video.{name}": tensor for name, tensor in self._past.video.items()}
        for (block, part), trace in stream.traces.items():
            tensors |= {f"stream.{block}.{part}.{number}": tensor for number, tensor in enumerate(trace)}
        about = {
            "format": _FORMAT,
            "config": dataclasses.asdict(self._pipeline.config),
            "stream": {name: getattr(stream, name) for name in ("frames", "chunks", "origin", "kept")},
            "motion": dataclasses.asdict(self._past.motion),
            "steering": dataclasses.asdict(self._steering),
            "seed": self._seed,
            "decode": self._decode,
        }
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        about_bytes = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        return save_tensors({**whole, "about": about_bytes})

    @classmethod
    def restore(cls, pipeline: WorldPipeline, data: bytes) -> Session:
        """The session of which `data` is a snapshot. ValueError when it is none, or one of another model."""
        _check(pipeline, ("vae", "dit"))
        try:
            tensors = load_tensors(data)
            about: dict[str, Any] = json.loads(bytes(tensors.pop("about").tolist()))
            known = about["format"]
        except Exception as error:  # safetensors' own, of a file cut or foreign
            raise ValueError(f"this is not the snapshot of a session: {error}") from None
        if known != _FORMAT:
            raise ValueError(f"this snapshot has format {known}, this version reads {_FORMAT}")
        if about["config"] != json.loads(json.dumps(dataclasses.asdict(pipeline.config))):
            raise ValueError(f"this snapshot is of a session of other weights than these of {pipeline.config.name!r}")
        tensors = {name: tensor.to(pipeline.device) for name, tensor in tensors.items()}
        session = cls.__new__(cls)
        session._begin(
            pipeline,
            tensors["image"],
            tensors["text"],
            tensors["mask"],
            about["seed"],
            tensors["intrinsics"].cpu(),
            Steering(**about["steering"]),
            about["decode"],
        )
        traces: dict[tuple[int, str], tuple[Tensor, ...]] = {}
        for name in sorted(tensors):  # and so by number
            if name.startswith("stream."):
                _, block, part, _ = name.split(".")
                traces[int(block), part] = (*traces.get((int(block), part), ()), tensors[name])
        stream = StreamState(**dict(about["stream"], kept=tuple(map(tuple, about["stream"]["kept"]))), traces=traces)
        video = {name.removeprefix("video."): x for name, x in tensors.items() if name.startswith("video.")}
        moved = about["motion"]
        motion = Motion(tuple(moved["position"]), moved["yaw"], moved["pitch"], tuple(moved["velocity"]))
        session._past = _Past(stream, video, motion)
        return session


class Step(NamedTuple):
    """What a session is asked for, as `Session.step` takes it."""

    session: Session
    actions: Actions = ""
    stop: Callable[[], bool] | None = None
    known: Tensor | None = None


def step_together(steps: Sequence[Step]) -> list[Chunk | Exception]:
    """The next chunks of sessions of one pipeline and of equal `place`, made as one batch; of each one its chunk, or
    what it would have raised alone. What goes wrong with one leaves the others as they are. ValueError for a session
    that is there twice, and for unlike ones.
    """
    sessions = [step.session for step in steps]
    if len({(id(session._pipeline), session.place()) for session in sessions}) > 1:
        raise ValueError("these sessions are at unlike places, or of several models: step them apart, or by an Engine")
    if len(set(sessions)) < len(sessions):
        raise ValueError("a session takes one step after another: give each once")
    found: list[Chunk | Exception | None] = [None] * len(steps)
    asked: dict[int, _Asked] = {}
    for number, step in enumerate(steps):
        try:
            asked[number] = step.session._asked(step)
        except ValueError as error:
            found[number] = error
    for known in (True, False):
        chosen = {number: each for number, each in asked.items() if (each.known is not None) == known}
        made = _made(list(chosen.values())) if chosen else []
        for (number, each), result in zip(chosen.items(), made, strict=True):
            try:
                found[number] = result if isinstance(result, SessionStopped) else each.session._commit(each, *result)
            except Exception as error:  # of this session alone
                found[number] = error
    return found  # type: ignore[return-value]


def _made(asked: Sequence[_Asked]) -> list[tuple[Tensor, StreamState] | SessionStopped]:
    """Of each one its clean latents (1, C, t, h, w) and the past that they leave; they are known of all or of none."""
    pipeline = asked[0].session._pipeline
    camera = CameraFeatures.cat([each.camera for each in asked]).to(pipeline.device)
    pasts = [each.past.stream for each in asked]
    networks = [each.session._network.going_on(past, None) for each, past in zip(asked, pasts, strict=True)]
    network, sampler = ChunkStream.together(networks, camera), pipeline.config.sampler
    noise = torch.cat([each.noise for each in asked])
    stopped: dict[int, SessionStopped] = {}

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        stopped.update({n: why for n, each in enumerate(asked) if n not in stopped and (why := each.stopped())})
        if len(stopped) == len(asked):
            raise _AllStopped
        return network.velocity(x, timestep, [noise.shape[2]])

    def fresh(step: int) -> Tensor:
        return torch.cat([each.session._noise(each.past, noise.shape[2], step) for each in asked])

    known = [each.known.to(noise) for each in asked if each.known is not None]
    try:
        if known:
            latents = torch.cat(known)
        else:
            frozen = 0 if pasts[0].frames else 1
            fresh_noise = fresh if sampler.fresh_noise else None
            latents = euler(velocity, noise, sampler_sigmas(sampler), frozen, fresh=fresh_noise)
    except _AllStopped:
        return [stopped[number] for number in range(len(asked))]
    network.keep(latents, [noise.shape[2]])
    states = [network.state] if len(asked) == 1 else apart(network.state, pasts)
    results = list(zip(latents.split(1), states, strict=True))
    return [stopped.get(number, result) for number, result in enumerate(results)]


class _AllStopped(Exception):
    pass


def _check(pipeline: WorldPipeline, parts: Sequence[str]) -> None:
    """ValueError when a pipeline cannot make a video go on."""
    config = pipeline.config
    if not config.chunk_causal:
        raise ValueError(f"the weights of {config.name!r} see the whole clip at once: use chunk-causal ones")
    for name in parts:
        pipeline.part(name)
    if not pipeline.part("vae").config["decoder_causal"]:  # type: ignore[index]
        raise ValueError("this autoencoder decodes whole videos: a session needs one with decoder_causal=True")

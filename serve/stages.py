"""The deployments that compute: text, stage 1, refiner, decoder. Each has its own number of replicas.

A video is a chain of streams. The decoder asks a refiner for the video's latents, and that one a stage 1; a replica
keeps a video from its first chunk to its last, so that its past stays where it is, and nothing routes a chunk. What a
stage has made it keeps in `Results` before it hands it on. A stream that begins again, after a replica has died, finds
that there, and computes only what is not.

Before each chunk stage 1 asks `Videos` whether the video is still wanted, and between the steps of its sampler whether
its files are still there; when not, the streams end, and need not be cancelled from outside.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Histogram
from torch import Tensor

from longtake.model.camera import Steering
from longtake.model.pipeline import WorldPipeline
from longtake.model.random_weights import random_pipeline
from longtake.model.refiner import RefinerStream
from longtake.model.refiner.refiner import SINK
from longtake.model.refiner.text import REFINER_TOKENS
from longtake.model.vae import decode_more
from longtake.platform.engine import Actions, Engine, Session, SessionStopped
from longtake.platform.evaluate.novelty import describe
from longtake.platform.evaluate.sample import Sample
from longtake.platform.evaluate.scores import score
from longtake.platform.store.fragments import encode_fragment, remux
from longtake.platform.store.video import frames_of
from longtake.serve.metrics import BOUNDARIES, CHUNK_SECONDS
from longtake.serve.results import STATE, Results
from longtake.serve.settings import Settings
from longtake.serve.task import Task


class Stage:
    """A replica with parts of a pipeline, and one thread that computes."""

    def __init__(self, settings: Settings, parts: tuple[str, ...]) -> None:
        self.results = Results(settings.store)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline = self._loaded(settings, parts)
        self.thread = ThreadPoolExecutor(1, "compute")
        self.seconds = Histogram(CHUNK_SECONDS, "From a chunk's beginning to its end, in one stage", BOUNDARIES)

    def _loaded(self, settings: Settings, parts: tuple[str, ...]) -> WorldPipeline:
        rounded = settings.quantization
        if settings.random_weights:
            return random_pipeline(settings.config, parts, self.device, quantization=rounded)
        given = settings.preset, settings.weights, self.device, self.dtype, parts
        return WorldPipeline.from_pretrained(*given, quantization=rounded)

    async def run(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._timed, work, *arguments)

    def _timed(self, work: Any, *arguments: Any) -> Any:
        begin = time.monotonic()
        made = work(*arguments)
        self.seconds.observe(time.monotonic() - begin)
        return made


@serve.deployment
class Text(Stage):
    """Reads prompts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, tuple(part for part in settings.parts if "text" in part))

    async def read(self, video: str, prompt: str, refine: bool) -> None:
        """Keep the prompt's features in the video's text.safetensors."""
        await self.run(self._read, video, prompt, refine)

    def _read(self, video: str, prompt: str, refine: bool) -> None:
        features, mask = self.pipeline.encode_text([prompt])
        found = {"stage1": features, "stage1_mask": mask}
        if refine:
            features, mask = self.pipeline.encode_refiner_text([prompt])
            found |= {"refiner": features, "refiner_mask": mask}
        self.results.put_tensors(f"{video}/text.safetensors", found)


@serve.deployment
class Stage1(Stage):
    """Makes latents, for as many videos at once as there is memory for."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, ("vae", "dit"))
        self.engine = Engine(self.pipeline, most_together=settings.stage1.together, decode=False)

    async def latents(self, task: Task) -> AsyncGenerator[np.ndarray, None]:
        """(1, C, t, h, w) of chunk after chunk."""
        session, poses, known = await asyncio.to_thread(self._open, task)
        stop = self.results.gone(task.id)
        try:
            async for number, actions in self._actions(task, poses):
                given = known[number] if number < len(known) else None
                begin = time.monotonic()
                made = await asyncio.wrap_future(self.engine.submit(session, actions, stop, given))
                latents = made.latents.cpu()
                if given is None:
                    self.seconds.observe(time.monotonic() - begin)
                    name = f"{task.id}/stage1/{number:05}"
                    await asyncio.to_thread(self.results.put_tensors, name, {"latents": latents, "c2w": made.c2w})
                yield latents.numpy()
        except SessionStopped:
            return
        finally:
            self.engine.close_session(session)

    async def _actions(self, task: Task, poses: Sequence[Tensor]) -> AsyncIterator[tuple[int, Actions]]:
        """Of chunk after chunk, while they are wanted."""
        videos = serve.get_deployment_handle("Videos", serve.get_replica_context().app_name)
        for number in itertools.count() if task.live else range(len(poses)):
            if (keys := await videos.next.remote(task.id, task.run, number)) is None:
                return
            yield number, keys if task.live else poses[number]

    def _open(self, task: Task) -> tuple[Session, Sequence[Tensor], list[Tensor]]:
        text = self.results.tensors(f"{task.id}/text.safetensors")
        image = Image.open(io.BytesIO(self.results.get(f"{task.id}/image.png")))
        with np.load(io.BytesIO(self.results.get(f"{task.id}/path.npz"))) as path:
            c2w, intrinsics = torch.from_numpy(path["c2w"]), torch.from_numpy(path["intrinsics"])
        config = self.pipeline.config
        session = self.engine.open(
            image,
            seed=task.seed,
            text=(text["stage1"].to(self.device), text["stage1_mask"].to(self.device)),
            intrinsics=intrinsics,
            steering=Steering(task.key_map or config.key_map, config.fps),
        )
        poses = c2w[1:].split(session.actions_per_chunk) if len(c2w) > 1 else ()
        return session, poses, self.results.latents(f"{task.id}/stage1")


@serve.deployment
class Refine(Stage):
    """Refines latents as they come."""

    def __init__(self, settings: Settings, source: DeploymentHandle) -> None:
        super().__init__(settings, ("refiner",))
        self.source = source.options(stream=True)
        if self.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Refine noise until a window is full, and once beside it: what is compiled, tuned or captured is so before the
        first video.
        """
        config = self.pipeline.config
        length = REFINER_TOKENS if config.refiner_reads_own_text else config.text.length
        text = torch.zeros(1, length, config.refiner.text_dim, device=self.device, dtype=self.dtype)
        real = torch.ones(1, length, device=self.device)
        real[:, -1] = config.refiner_reads_own_text  # LTX-2's registers take the place of its padding
        stream = self.pipeline.refining(text, real, [0])
        block = torch.zeros(1, config.latent_channels, config.refiner.block_size or 1, *config.latent_size)
        while stream.past.length < config.refiner.window - SINK:
            list(stream.take(block.to(self.device)))
        list(stream.take(block.to(self.device)))

    async def latents(self, task: Task) -> AsyncGenerator[np.ndarray, None]:
        """(1, C, t, h, w): the first frame, then block after block."""
        text = await asyncio.to_thread(self.results.tensors, f"{task.id}/text.safetensors")
        known = await asyncio.to_thread(self.results.latents, f"{task.id}/refined")
        source: Any = self.source.latents.remote(task)
        read = [text[name].to(self.device) for name in ("refiner", "refiner_mask")]
        stream = self.pipeline.refining(read[0], read[1], [task.seed], [each.to(self.device) for each in known])
        number = 0
        async for part in _and_last(source):
            for latents in await self.run(self._refined, stream, part):
                if number > len(known):  # the first part is the first frame, which is as it was
                    name = f"{task.id}/refined/{number - 1:05}"
                    await asyncio.to_thread(self.results.put_tensors, name, {"latents": latents})
                yield latents.numpy()
                number += 1

    def _refined(self, stream: RefinerStream, part: np.ndarray | None) -> list[Tensor]:
        """What this part of the video, or its end, lets be refined."""
        made = stream.rest() if part is None else stream.take(torch.from_numpy(part).to(self.device))
        return [latents.cpu() for latents in made]


@serve.deployment
class Decode(Stage):
    """Makes frames of latents, and a video of frames."""

    def __init__(self, settings: Settings, stage1: DeploymentHandle, refiner: DeploymentHandle | None) -> None:
        super().__init__(settings, ("vae",))
        self.config = self.pipeline.config
        self.stage1 = stage1.options(stream=True)
        self.refiner = None if refiner is None else refiner.options(stream=True)
        if self.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Decode noise twice, as `Refine` refines it."""
        part = torch.zeros(1, self.config.latent_channels, 3, *self.config.latent_size, device=self.device)
        _, past = decode_more(self.pipeline.part("vae"), part, {})  # type: ignore[arg-type]
        decode_more(self.pipeline.part("vae"), part, past)  # type: ignore[arg-type]

    async def fragments(self, task: Task) -> AsyncGenerator[int, None]:
        """How many frames the video has, after each fragment that is there."""
        begun = await asyncio.to_thread(self.results.numbered, f"{task.id}/video", ".m4s")
        source = self.refiner if task.refine and self.refiner is not None else self.stage1
        frames = number = 0
        async for images in _ahead(self._decoded(source.latents.remote(task))):
            images = images[: task.frames - frames]
            if number >= begun and len(images):
                await asyncio.to_thread(self._write, task, images, frames, number)
            frames, number = frames + len(images), number + 1
            yield frames

    async def _decoded(self, parts: Any) -> AsyncIterator[np.ndarray]:
        """uint8 (f, H, W, 3) of one part of a video's latents after another."""
        past: dict[str, Tensor] = {}
        async for part in parts:
            images, past = await self.run(self._next, part, past)
            yield images

    def _next(self, part: np.ndarray, past: dict[str, Tensor]) -> tuple[np.ndarray, dict[str, Tensor]]:
        latents = torch.from_numpy(part).to(self.device)
        made, past = decode_more(self.pipeline.part("vae"), latents, past)  # type: ignore[arg-type]
        return made[0].cpu().numpy(), past

    def _write(self, task: Task, images: np.ndarray, first: int, number: int) -> None:
        begin, fragment = encode_fragment(images, self.config.fps, first, number)
        if number == 0:
            self.results.put(f"{task.id}/video/begin.mp4", begin)
            self.results.put(f"{task.id}/thumbnail.jpg", _jpeg(images[0]))
        about = {"first": first, "frames": len(images)}
        self.results.put(f"{task.id}/video/{number:05}.json", json.dumps(about).encode())
        self.results.put(f"{task.id}/video/{number:05}.m4s", fragment)

    async def finish(self, task: Task) -> None:
        """Make one file of the video."""
        await asyncio.to_thread(self._finish, task)

    def _finish(self, task: Task) -> None:
        video, folder = task.id, f"{task.id}/video"
        if task.live:
            self._write_path(video)
        names = ["begin.mp4", *(f"{n:05}.m4s" for n in range(self.results.numbered(folder, ".m4s")))]
        glued = b"".join(self.results.get(f"{folder}/{name}") for name in names)
        with TemporaryDirectory() as scratch:
            remux(glued, whole := Path(scratch) / "content.mp4")
            self.results.put(f"{video}/content.mp4", whole.read_bytes())
        for made in ("refined", "text.safetensors") if task.draft else STATE:  # nothing goes on from these any more
            self.results.remove(f"{video}/{made}")

    async def judge(self, video: str) -> tuple[dict[str, float], str]:
        """Scores of a whole video, and what its novelty is computed from."""
        return await asyncio.to_thread(self._judge, video)

    def _judge(self, video: str) -> tuple[dict[str, float], str]:
        with np.load(io.BytesIO(self.results.get(f"{video}/path.npz"))) as path:
            sample = Sample(int(path["frames"]))
            c2w = path["c2w"][sample.indices]
            intrinsics = np.broadcast_to(path["intrinsics"], (len(c2w), 4))
        with TemporaryDirectory() as scratch:
            (whole := Path(scratch) / "content.mp4").write_bytes(self.results.get(f"{video}/content.mp4"))
            frames = sample.of(frame[None] for frame in frames_of(whole)).frames()
        return score(frames, c2w, intrinsics, self.config.fps, sample.indices), describe(frames)

    def _write_path(self, video: str) -> None:
        """Where the camera went, once that is known."""
        made = [self.results.tensors(f"{video}/stage1/{n:05}") for n in range(self.results.numbered(f"{video}/stage1"))]
        with np.load(io.BytesIO(self.results.get(f"{video}/path.npz"))) as path:
            c2w, buffer = torch.cat([each["c2w"] for each in made]).numpy(), io.BytesIO()
            np.savez(buffer, c2w=c2w, intrinsics=path["intrinsics"], frames=len(c2w))
        self.results.put(f"{video}/path.npz", buffer.getvalue())


async def _ahead(stream: AsyncIterator[np.ndarray]) -> AsyncIterator[np.ndarray]:
    """What comes, of which the next may be made while one is used."""

    async def take() -> np.ndarray | None:
        return await anext(stream, None)

    coming = asyncio.create_task(take())
    try:
        while (made := await coming) is not None:
            coming = asyncio.create_task(take())
            yield made
    finally:
        coming.cancel()


async def _and_last(stream: AsyncIterator[np.ndarray]) -> AsyncIterator[np.ndarray | None]:
    """What comes, and None when nothing more does."""
    async for part in stream:
        yield part
    yield None


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

"""One video from an image to its frames, through all parts of a pipeline, as early as each can give something."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from longtake.model.camera import Trajectory
from longtake.model.config import WorldModelConfig
from longtake.model.pipeline import ImageInput, WorldPipeline

Made = TypeVar("Made")
Told = Callable[[str, int, int], None]  # stage, how much of it is done, of how much


def make_video(
    pipeline: WorldPipeline,
    image: ImageInput,
    caption: str,
    trajectory: Trajectory,
    seed: int = 0,
    num_steps: int | None = None,
    negative_prompt: str = "",
    refine: bool = True,
    told: Told | None = None,
) -> Iterator[np.ndarray]:
    """The frames of a video along the trajectory, uint8 (f, H, W, 3) each, as they are made; the first is the image.

    A chunk-causal model beside a refiner of blocks and a causal decoder gives the first ones while the others are still
    noise, unless one part at a time has the device. Otherwise each stage waits for the one before. told(stage, done,
    total): counts steps or chunks of "stage 1", and latent frames of "refine" and "decode". Text encoders are given up
    as soon as the text is read. ValueError for what the pipeline cannot make, before it begins.
    """
    config = pipeline.config
    say: Told = told or (lambda stage, done, total: None)
    camera = trajectory.features(config.image_size, config.vae_stride)
    frames = camera.conditions.shape[1]
    with torch.no_grad():
        text, mask = pipeline.encode_text([caption])
        negative = None
        if config.sampler.guidance_scale != 1:
            negative = pipeline.encode_text([negative_prompt], negative=True)
        own = pipeline.encode_refiner_text([caption]) if refine else None
        pipeline.release("text", "refiner_text")
        start = pipeline.encode_image(image)
    given: Any = (start, text, mask, camera, [seed], num_steps, lambda done, all_: say("stage 1", done, all_))
    if not _streams(pipeline, refine):
        latents = pipeline.rollout(*given, negative=negative)
        if own is not None:
            latents = pipeline.refine(latents, *own, [seed])
            say("refine", frames, frames)
        yield from _counted(pipeline.decode_chunks(latents), config.vae_stride[0], frames, say)
        return
    kind = start.shape, own is not None
    parts: Iterator[Tensor] = pipeline.stream(*given, negative=negative)
    if own is not None:
        parts = _told(pipeline.refine_chunks(_ahead(parts, pipeline, kind), *own, [seed]), frames, say)
    decoded = pipeline.decode_stream(_ahead(parts, pipeline, kind))
    for number, part in enumerate(_counted(decoded, config.vae_stride[0], frames, say), 1):
        if number == _until_steady(config):
            pipeline.settled.add(kind)
        yield part


def _streams(pipeline: WorldPipeline, refine: bool) -> bool:
    """Whether a chunk can go through all stages before the next one is made."""
    config = pipeline.config
    refines = not refine or config.refiner.block_size is not None
    return config.chunk_causal and refines and pipeline.decodes_chunks and pipeline.residency == "all"


def _told(parts: Iterable[Tensor], frames: int, say: Told) -> Iterator[Tensor]:
    done = 0
    for part in parts:
        done += part.shape[2]
        say("refine", done, frames)
        yield part


def _counted(decoded: Iterable[np.ndarray], stride: int, frames: int, say: Told) -> Iterator[np.ndarray]:
    raw = 0
    for part in decoded:
        raw += len(part)
        say("decode", (raw - 1) // stride + 1, frames)
        yield part


def _until_steady(config: WorldModelConfig) -> int:
    """Parts of a video after which all windows are full, so that the others are computed like the last one."""
    return max(4 + (config.chunk_window or 0), 2 + math.ceil(config.refiner.window / (config.refiner.block_size or 1)))


def _ahead(parts: Iterator[Tensor], pipeline: WorldPipeline, kind: Hashable) -> Iterator[Tensor]:
    """The parts, of which the next is made meanwhile, by a thread and on a CUDA stream of its own; off a GPU just the
    parts.

    Until videos of its kind are settled they are waited for: while one thread compiles, the tracer changes how others
    call their modules, and what is timed has the GPU for itself.
    """
    device = pipeline.device
    if device.type != "cuda":
        yield from parts
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def make() -> tuple[Tensor, Any] | None:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            part = next(parts, None)
            return None if part is None else (part, stream.record_event())

    def received(part: Tensor, event: Any) -> Tensor:
        here = torch.cuda.current_stream(device)
        here.wait_event(event)
        part.record_stream(here)
        return part

    while kind not in pipeline.settled:
        if (item := make()) is None:
            return
        yield received(*item)
    for item in _by_a_thread(make):
        yield received(*item)


def _by_a_thread(make: Callable[[], Made | None]) -> Iterator[Made]:
    """What `make` returns until it is None, one ahead."""
    made: queue.Queue[Any] = queue.Queue(1)
    given_up = threading.Event()

    def put(item: Any) -> bool:
        while not given_up.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            while put(item := make()) and item is not None:
                pass
        except BaseException as error:  # raised where the parts are used
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        given_up.set()
        thread.join()

"""Batches on the device: streamed by Ray Data in the run's own order, or drawn from a set that stays on the device.

A source turns (first sample, count) into arrays and runs in Ray Data tasks; `stream` asks for one micro-batch a task and gets
them back in order, so that a resumed run starts at any sample without reading what came before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import cv2
import numpy as np
import ray
import ray.data
import torch
from torch import Tensor

from longtake.model.config import WorldModelConfig
from longtake.model.text import tokenize
from longtake.platform.data.latents import decode_row
from longtake.platform.train.order import Order, Share
from longtake.platform.train.rows import RowIndex

Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]

_SEGMENT = 8192  # tasks planned at once
_RESIDENT_ROWS = 64  # rows a task reads while the resident set is loaded
_AHEAD = 4  # batches that wait on the device or in pinned memory


class Source(Protocol):
    """What reads samples. It travels to the tasks, so it holds no open files."""

    index: RowIndex
    order: Order

    def batch(self, start: int, count: int) -> Arrays: ...


@dataclass(frozen=True)
class ClipSource:
    """Random windows of `window` frames of stored clips: {"frames": uint8 (B, window, H, W, 3)}."""

    index: RowIndex
    order: Order
    window: int

    def batch(self, start: int, count: int) -> Arrays:
        rows = self.order.rows(start, count)
        found = self.index.read(rows, ["frames"])
        return {"frames": np.stack([self._window(row["frames"], start + n) for n, row in enumerate(found)])}

    def _window(self, frames: list[bytes], sample: int) -> np.ndarray:
        if len(frames) < self.window:
            raise ValueError(f"a clip has {len(frames)} frames, fewer than the window of {self.window}: lower --set window")
        first = int(self.order.generator(sample).integers(len(frames) - self.window + 1))
        return np.stack([_decode_jpeg(frame) for frame in frames[first : first + self.window]])


@dataclass(frozen=True)
class LatentSource:
    """Encoded clips: latents float16, c2w, intrinsics, tokens int64 (B, L) and tokens_mask bool (B, L)."""

    index: RowIndex
    order: Order
    text_length: int

    def batch(self, start: int, count: int) -> Arrays:
        return self.read(self.order.rows(start, count))

    def read(self, rows: np.ndarray) -> Arrays:
        clips = [decode_row(row) for row in self.index.read(rows, _LATENT_COLUMNS)]
        tokens, mask = tokenize([clip.caption for clip in clips], self.text_length)
        return {
            "latents": np.stack([clip.latents for clip in clips]),
            "c2w": np.stack([clip.c2w for clip in clips]),
            "intrinsics": np.stack([clip.intrinsics for clip in clips]),
            "tokens": tokens.numpy(),
            "tokens_mask": mask.numpy(),
        }


_LATENT_COLUMNS = ["key", "latents", "shape", "c2w", "intrinsics", "caption", "fps", "split", "licence"]


def check_latents(source: LatentSource, config: WorldModelConfig, frames: int) -> None:
    """ValueError when the first stored clip is not one of `frames` frames of this preset."""
    stride_t, stride_h, stride_w = config.vae_stride
    height, width = config.image_size
    expected = (config.latent_channels, (frames - 1) // stride_t + 1, height // stride_h, width // stride_w)
    found = source.read(np.zeros(1, np.int64))
    if found["latents"].shape[1:] != expected or found["c2w"].shape[1] != frames:
        raise ValueError(
            f"latents of shape {found['latents'].shape[1:]} from {found['c2w'].shape[1]} frames do not fit preset "
            f"{config.name!r} at {frames} frames, which needs {expected}: encode with --preset {config.name} --frames {frames}"
        )


def _decode_jpeg(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _task(block: Arrays, read: Callable[[Any, int], Arrays], source: ray.ObjectRef, first: int) -> Arrays:
    cv2.setNumThreads(0)
    return read(ray.get(source), first + int(block["id"][0]))


def run_in_order(read: Callable[[Any, int], Arrays], source: Any, first: int, count: int, workers: int) -> Iterator[Arrays]:
    """read(source, number) for number = first ... first + count - 1, computed in parallel by Ray Data, in order.

    The pipeline is executed by a coordinator process of its own, which leaves this one to the training loop. `workers`
    training workers do so side by side and share the cluster's CPUs.
    """
    reference = ray.put(source)
    for begin in range(first, first + count, _SEGMENT):
        size = min(_SEGMENT, first + count - begin)
        task = partial(_task, read=read, source=reference, first=begin)
        dataset = ray.data.range(size, override_num_blocks=size).map_batches(task, batch_size=None)
        options = dataset.context.execution_options
        options.preserve_order = True
        if workers > 1:
            cpus = ray.cluster_resources().get("CPU", 1)
            options.resource_limits = options.resource_limits.copy(cpu=max(1, cpus // workers - 1))
        iterator = dataset.streaming_split(1)[0]
        yield from iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=_AHEAD)


def _read_share(source: Source, number: int, share: Share, first: int) -> Arrays:
    return source.batch(share.start(first, number), share.micro)


def stream(source: Source, share: Share, first: int, number: int, count: int, device: torch.device) -> Iterator[Batch]:
    """This worker's micro-batches `number` ... `number + count - 1`, counted from sample `first`, on the device."""
    read = partial(_read_share, share=share, first=first)
    return prefetch(run_in_order(read, source, number, count, share.workers), device)


def prefetch(arrays: Iterator[Arrays], device: torch.device) -> Iterator[Batch]:
    """Copy batches to the device from a thread, a few ahead of the consumer, on a stream of their own."""
    waiting: queue.Queue = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            for batch in arrays:
                if not put(_to_device(batch, device, copies)):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  (raised again where the batch is asked for)
            put(error)

    threading.Thread(target=produce, daemon=True, name="prefetch").start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, copied = item
            if copied is not None:
                torch.cuda.current_stream(device).wait_event(copied)
                for tensor in batch.values():
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        stop.set()


def _to_device(batch: Arrays, device: torch.device, copies: Any) -> tuple[Batch, Any]:
    # Ray's arrays are read-only views of shared memory, hence the copy.
    if copies is None:
        return {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}, None
    with torch.cuda.stream(copies):
        pinned = {name: torch.from_numpy(np.array(array)).pin_memory() for name, array in batch.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}
        copied = torch.cuda.Event()
        copied.record()
    return moved, copied


def _read_chunk(source: LatentSource, number: int) -> Arrays:
    first = number * _RESIDENT_ROWS
    return source.read(np.arange(first, min(first + _RESIDENT_ROWS, len(source.index))))


class Resident:
    """All encoded clips in the memory of the device (or the host); a batch is an index gather there.

    Loaded once through Ray Data, by every worker in full: any worker may need any clip.
    """

    def __init__(self, source: LatentSource, where: torch.device, device: torch.device, workers: int) -> None:
        self.order, self.device = source.order, device
        chunks = -(-len(source.index) // _RESIDENT_ROWS)
        self._set: Batch = {}
        done = 0
        for arrays in run_in_order(_read_chunk, source, 0, chunks, workers):
            for name, array in arrays.items():
                if name not in self._set:
                    like = torch.from_numpy(np.array(array[:1]))
                    self._set[name] = like.new_empty((len(source.index), *like.shape[1:]), device=where)
                self._set[name][done : done + len(array)] = torch.from_numpy(np.array(array))
            done += len(next(iter(arrays.values())))
        self._epochs: dict[int, Tensor] = {}

    def batch(self, start: int, count: int) -> Batch:
        """Samples start ... start + count - 1 of the order, on the device."""
        rows = self._rows(start, count)
        return {name: tensor.index_select(0, rows).to(self.device, non_blocking=True) for name, tensor in self._set.items()}

    def _rows(self, start: int, count: int) -> Tensor:
        """The order's rows as a device tensor; an epoch's permutation is uploaded once."""
        size = self.order.epoch_size
        parts = []
        while count:
            epoch, within = divmod(start, size)
            if epoch not in self._epochs:
                where = next(iter(self._set.values())).device
                self._epochs = {epoch: torch.from_numpy(self.order.rows(epoch * size, size)).to(where)}
            taken = min(count, size - within)
            parts.append(self._epochs[epoch][within : within + taken])
            start, count = start + taken, count - taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def draw(resident: Resident, share: Share, first: int, number: int, count: int) -> Iterator[Batch]:
    """As `stream`, from the resident set."""
    for k in range(number, number + count):
        yield resident.batch(share.start(first, k), share.micro)

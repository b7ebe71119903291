"""Batches on the device, in the run's own order: decoded ahead by processes, or drawn from a set that stays there.

A source turns (first sample, count) into arrays, so that a resumed run starts at any sample without reading what came
before.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from longtake.model.config import WorldModelConfig
from longtake.model.text import tokenize
from longtake.platform.data.captions import refiner_features, stored_features
from longtake.platform.data.latents import COLUMNS, REFINER_TEXT, TEXT, TRAJECTORY, EncodedClip, LatentStore, decode_row
from longtake.platform.data.store import ClipStore, DamagedShard
from longtake.platform.observe.notices import say
from longtake.platform.train.order import Mixture, Order, Share
from longtake.platform.train.rows import RowIndex, index_rows
from longtake.platform.train.stages import Corpora, Stage

Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]

_CHUNK = 64  # rows a thread reads while the resident set is loaded


class Source(Protocol):
    """What reads samples; it may be pickled."""

    def batch(self, start: int, count: int) -> Arrays: ...


@dataclass(frozen=True)
class ClipSource:
    """Random windows of `window` frames of stored clips: {"frames": uint8 (B, window, H, W, 3)}.

    A clip is read once for the consecutive samples that the order takes from it.
    """

    index: RowIndex
    order: Order
    window: int
    image_size: tuple[int, int]

    def batch(self, start: int, count: int) -> Arrays:
        rows = self.order.rows(start, count)
        return {"frames": self.index.whole(rows, lambda rows, at: self._read(rows, start + at))}

    def _read(self, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
        clips = self.index.columns(rows, ["frames"])
        out = np.empty((len(rows), self.window, *self.image_size, 3), np.uint8)
        for n, clip in enumerate(clips):
            frames = clip["frames"].values
            if len(frames) < self.window:
                raise ValueError(f"a clip has {len(frames)} frames: set window={len(frames)} or less with --set")
            first = int(self.order.generator(int(samples[n])).integers(len(frames) - self.window + 1))
            for k in range(self.window):
                data = np.frombuffer(frames[first + k].as_buffer(), np.uint8)
                _decode_jpeg(data, out[n, k], self.index.paths[self.index.file[rows[n]]])
        return out


def _decode_jpeg(data: np.ndarray, out: np.ndarray, path: str) -> None:
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise DamagedShard(f"{path}: a stored frame is damaged")
    if image.shape != out.shape:
        found, needed = (f"{shape[0]} x {shape[1]}" for shape in (image.shape, out.shape))
        raise ValueError(f"{path}: a stored frame is of {found} pixels, the preset needs {needed}")
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


@dataclass(frozen=True)
class LatentSource:
    """Encoded clips: latents float16, c2w, intrinsics; of captions, tokens int64 (B, L) for an encoder that is trained,
    or the features of a frozen one, text float16 (B, L, D), and of either tokens_mask bool (B, L).

    features: whether a frozen encoder's are read. timesteps: of the trajectories that are read as noisy float16
    (B, K, C, T, h, w); pairs: whether a refiner's versions of the clips are. refiner_text: whether its own features of
    captions are read, as refiner_text float16 (B, L, D) and refiner_text_mask. ValueError for a clip that has none.
    padding: (latent frames, raw frames of each but the first) that clips are padded to; batches then have `frames`
    int64 (B,), how many latent frames are real. ValueError for a longer clip.
    """

    index: RowIndex
    order: Order
    text_length: int
    padding: tuple[int, int] | None = None
    features: bool = False
    timesteps: tuple[float, ...] = ()
    pairs: bool = False
    refiner_text: bool = False

    def batch(self, start: int, count: int) -> Arrays:
        return self.read(self.order.rows(start, count))

    def read(self, rows: np.ndarray) -> Arrays:
        return self.index.whole(rows, lambda rows, _: self._read(rows))

    def _read(self, rows: np.ndarray) -> Arrays:
        columns = COLUMNS + TEXT * self.features + TRAJECTORY * (self.pairs or bool(self.timesteps))
        columns += REFINER_TEXT * self.refiner_text
        clips = [decode_row(row) for row in self.index.read(rows, columns)]
        frames = {}
        if self.padding:
            frames = {"frames": np.array([clip.latents.shape[1] for clip in clips])}
            clips = [_padded(clip, *self.padding) for clip in clips]
        return (
            frames
            | self._trajectories(clips)
            | self._pairs(clips)
            | {
                "latents": np.stack([clip.latents for clip in clips]),
                "c2w": np.stack([clip.c2w for clip in clips]),
                "intrinsics": np.stack([clip.intrinsics for clip in clips]),
                **self._captions(clips),
            }
        )

    def _trajectories(self, clips: list[EncodedClip]) -> Arrays:
        if not self.timesteps:
            return {}
        for clip in clips:
            if clip.noisy is None:
                raise ValueError(
                    f"{clip.key} is no trajectory of a teacher: make some with `longtake make-trajectories`"
                )
            given = clip.timesteps
            if len(given) != len(self.timesteps) or not np.allclose(given, self.timesteps, atol=0.5):
                raise ValueError(
                    f"{clip.key} has noisy latents at timesteps {given}, the sampler's are {self.timesteps}: "
                    "make them again with `longtake make-trajectories`"
                )
        return {"noisy": np.stack([clip.noisy for clip in clips if clip.noisy is not None])}

    def _pairs(self, clips: list[EncodedClip]) -> Arrays:
        if not self.pairs:
            return {}
        for clip in clips:
            if clip.noisy is None or clip.timesteps != clips[0].timesteps:
                raise ValueError(
                    f"{clip.key} has no pairs, or at other sigmas than {clips[0].key}: make them all with one "
                    "`longtake make-pairs`"
                )
        return {"noisy": np.stack([clip.noisy for clip in clips if clip.noisy is not None])}

    def _captions(self, clips: list[EncodedClip]) -> Arrays:
        own: Arrays = {}
        if self.refiner_text:
            own = dict(zip(("refiner_text", "refiner_text_mask"), refiner_features(clips), strict=True))
        if self.features:
            return own | dict(zip(("text", "tokens_mask"), stored_features(clips, self.text_length), strict=True))
        tokens, mask = tokenize([clip.caption for clip in clips], self.text_length)
        return own | {"tokens": tokens.numpy(), "tokens_mask": mask.numpy()}


def _padded(clip: EncodedClip, latent_frames: int, stride: int) -> EncodedClip:
    """The clip with latent frames of zeros after its own, over which the camera stands still."""
    found, raw = clip.latents.shape[1], len(clip.c2w)
    if found > latent_frames or raw != stride * (found - 1) + 1:
        raise ValueError(
            f"{clip.key}: {found} latent frames from {raw} raw ones do not fit a stage of {latent_frames} from "
            f"{stride * (latent_frames - 1) + 1}: set frames={raw} or more with --set, or leave the clip out"
        )
    missing = latent_frames - found
    return dataclasses.replace(
        clip,
        latents=np.pad(clip.latents, ((0, 0), (0, missing), (0, 0), (0, 0))),
        c2w=np.pad(clip.c2w, ((0, stride * missing), (0, 0), (0, 0)), mode="edge"),
        intrinsics=np.pad(clip.intrinsics, ((0, stride * missing), (0, 0)), mode="edge"),
    )


@dataclass(frozen=True)
class Mixed:
    """Several sources as one, in the mixture's proportions."""

    sources: tuple[Any, ...]  # each a Source, or each a Resident
    mixture: Mixture

    def batch(self, start: int, count: int) -> dict[str, Any]:
        drawn = [
            (source.batch(first, len(places)), places)
            for source, (first, places) in zip(self.sources, self.mixture.parts(start, count), strict=True)
            if len(places)
        ]
        back = np.argsort(np.concatenate([places for _, places in drawn]))
        return {name: _joined([batch[name] for batch, _ in drawn], back) for name in drawn[0][0]}


def _joined(parts: list[Any], order: np.ndarray) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]
    return np.concatenate(parts)[order]


def open_sources(
    stage: Stage, config: WorldModelConfig, corpora: Corpora, split: str = "train"
) -> ClipSource | LatentSource | Mixed:
    """The stage's clips, mixed by the weights of their stores; errors as of `open_source`."""
    sources = tuple(open_source(stage, config, uri, split) for uri, _ in corpora)
    if len(sources) == 1:
        return sources[0]
    return Mixed(sources, Mixture(tuple(weight for _, weight in corpora), stage.seed))


def open_source(stage: Stage, config: WorldModelConfig, uri: str, split: str = "train") -> ClipSource | LatentSource:
    """The stage's clips.

    Shards that are damaged are said and left out. ValueError when the split has none, when they are of the other kind,
    encoded or not, when all shards are damaged, and when the first clip does not fit the configuration.
    """
    store = ClipStore(uri) if stage.objective == "vae" else LatentStore(uri)
    column, job = ("frames", "render-worlds") if stage.objective == "vae" else ("latents", "encode-latents")
    index = index_rows([f"{store.uri}/{name}.parquet" for name in store.shards()], split=split)
    for damage in index.damaged:
        say(f"{damage}; going on without its clips")
    if not len(index):
        raise ValueError(f"{uri} has no {split} clips: make some with `longtake {job}`")
    if column not in index.stored:
        raise ValueError(f"{uri} holds no {column}, which {stage.name} trains on: give a store that `{job}` has made")
    order = Order(len(index), stage.seed, stage.windows_per_clip)
    if stage.objective == "vae":
        source = ClipSource(index, order, stage.window, config.image_size)
        source.batch(0, 1)
        return source
    padding = (config.latent_frames(stage.frames), config.vae_stride[0]) if stage.pad else None
    if config.text.frozen and TEXT[0] not in index.stored:
        raise ValueError(f"{uri} holds no features of captions, which preset {config.name!r} reads: encode it again")
    timesteps = config.sampler.timesteps[:-1] if stage.objective == "ode" else ()
    if timesteps and TRAJECTORY[0] not in index.stored:
        raise ValueError(f"{uri} holds no trajectories of a teacher: make some with `longtake make-trajectories`")
    pairs, own_text = False, False
    if stage.objective == "refiner":
        pairs, own_text = bool(stage.options.get("pairs")), config.refiner_reads_own_text
        _check_refiner(uri, index.stored, config, pairs, own_text)
    source = LatentSource(index, order, config.text.length, padding, config.text.frozen, timesteps, pairs, own_text)
    _check_latents(source, config, stage.frames)
    return source


def _check_refiner(uri: str, stored: list[str], config: WorldModelConfig, pairs: bool, own_text: bool) -> None:
    """ValueError when a store lacks what the refiner's stage reads beside latents."""
    if pairs and TRAJECTORY[0] not in stored:
        raise ValueError(
            f"{uri} holds no pairs: make some with `longtake make-pairs`, or train beside stage 1 with "
            "--set options.pairs=False"
        )
    if own_text and REFINER_TEXT[0] not in stored:
        raise ValueError(
            f"{uri} holds no features of captions for the refiner of preset {config.name!r} (refiner_text, "
            f"{config.refiner.text_dim} wide): encode its captions for the refiner"
        )


def _check_latents(source: LatentSource, config: WorldModelConfig, frames: int) -> None:
    expected = (config.latent_channels, config.latent_frames(frames), *config.latent_size)
    found = source.read(np.zeros(1, np.int64))
    if found["latents"].shape[1:] != expected or found["c2w"].shape[1] != frames:
        raise ValueError(
            f"latents of shape {found['latents'].shape[1:]} from {found['c2w'].shape[1]} frames do not fit preset "
            f"{config.name!r} at {frames} frames, which needs {expected}: "
            f"encode with --preset {config.name} --frames {frames}"
        )


def stream(
    source: Source, share: Share, number: int, count: int, device: torch.device, processes: int | None = None
) -> Iterator[Batch]:
    """This worker's micro-batches `number` ... `number + count - 1` on the device.

    processes: how many decode ahead, 0 to decode here; by default as many as keep up with a GPU, none for a CPU.
    """
    gpu = device.type == "cuda"
    if processes is None:
        processes = max(1, min(12, (os.cpu_count() or 1) // share.workers - 2)) if gpu else 0
    loader = DataLoader(
        _MicroBatches(source, share),  # type: ignore[arg-type]  # a mapping is enough for a sampler of our own
        batch_size=None,
        sampler=range(number, number + count),
        num_workers=processes,
        prefetch_factor=4 if processes else None,
        pin_memory=gpu,
        # Neither Ray's threads nor s3fs survive a fork.
        multiprocessing_context="spawn" if processes else None,
    )
    try:
        for batch in loader:
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    except (ValueError, ConnectionError) as error:
        # A process' error arrives with its traceback as its message.
        line, kind = str(error).strip().splitlines()[-1], type(error)
        raise kind(line.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")) from None


def draw(
    source: LatentSource | Mixed, where: torch.device, share: Share, number: int, count: int, device: torch.device
) -> Iterator[Batch]:
    """As `stream`, from memory: all clips are loaded now, to be kept `where`."""
    if isinstance(source, Mixed):
        kept: Resident | Mixed = Mixed(tuple(Resident(each, where, device) for each in source.sources), source.mixture)
    else:
        kept = Resident(source, where, device)
    return (kept.batch(share.start(k), share.micro) for k in range(number, number + count))


@dataclass(frozen=True)
class _MicroBatches:
    """A worker's micro-batches by number."""

    source: Source
    share: Share

    def __getitem__(self, number: int) -> Batch:
        cv2.setNumThreads(0)
        arrays = self.source.batch(self.share.start(number), self.share.micro)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Resident:
    """All encoded clips of a source in the memory of the device (or the host); a batch is an index gather there."""

    def __init__(self, source: LatentSource, where: torch.device, device: torch.device) -> None:
        self.order, self.device = source.order, device
        size = len(source.index)
        self._set: Batch = {}
        with ThreadPoolExecutor(8) as pool:
            starts = range(0, size, _CHUNK)
            chunks = pool.map(lambda start: source.read(np.arange(start, min(start + _CHUNK, size))), starts)
            for start, arrays in zip(starts, chunks, strict=True):
                for name, array in arrays.items():
                    piece = torch.from_numpy(array)
                    if name not in self._set:
                        self._set[name] = piece.new_empty((size, *piece.shape[1:]), device=where)
                    self._set[name][start : start + len(piece)] = piece
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, start: int, count: int) -> Batch:
        rows = self._rows(start, count)
        return {name: tensor.index_select(0, rows).to(self.device) for name, tensor in self._set.items()}

    def _rows(self, start: int, count: int) -> Tensor:
        """The order's rows as a tensor; an epoch's permutation is uploaded once."""
        size = self.order.epoch_size
        parts = []
        while count:
            epoch, within = divmod(start, size)
            if self._epoch is None or self._epoch[0] != epoch:
                where = self._set["latents"].device
                self._epoch = (epoch, torch.from_numpy(self.order.rows(epoch * size, size)).to(where))
            taken = min(count, size - within)
            parts.append(self._epoch[1][within : within + taken])
            start, count = start + taken, count - taken
        return torch.cat(parts)

"""A store made from another, shard by shard, by Ray Data actors; shards that are there already are not made again."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.observe.progress import Progress


def make_shards(
    actor: type, arguments: tuple[Any, ...], shards: Sequence[str], made: LatentStore, actors_per_gpu: int, what: str
) -> None:
    """Let actors of a class make those of `shards` that the store `made` lacks, on CPUs one.

    actor(*arguments): takes rows {"shard": names}, and gives them back with "clips", how many it wrote of each.
    """
    done = set(made.shards())
    left = [name for name in shards if name not in done]
    if not left:
        return
    import ray
    import ray.data

    from longtake.platform.observe import ray_cluster

    ray_cluster.connect()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    rows = ray.data.from_items([{"shard": name} for name in left], override_num_blocks=len(left)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        num_gpus=1 / actors_per_gpu if gpus else 0,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=min(max(gpus * actors_per_gpu, 1), len(left))),
    )
    with Progress(len(shards), "shards", what, initial=len(shards) - len(left)) as progress:
        clips = 0
        for row in rows.iter_rows():
            clips += int(row["clips"])
            progress.update(1, clips=clips)


def encoded_shards(uri: str) -> list[str]:
    """Of a store of latents. ValueError when there are none."""
    if names := LatentStore(uri).shards():
        return names
    raise ValueError(f"no encoded clips in {uri}: make some with `longtake encode-latents --latents {uri}`")


def actor_device() -> torch.device:
    """Where an actor computes; on CPUs with all threads, of which Ray allows one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(os.cpu_count() or 1)
    return torch.device("cpu")


class ClipMaker(ABC):
    """An actor that turns a shard of encoded clips into one of others, `batch` clips at a time."""

    def __init__(self, source: str, made: str, batch: int) -> None:
        self.source, self.made, self.batch = LatentStore(source), LatentStore(made), batch
        self.device = actor_device()

    @abstractmethod
    def make(self, clips: Sequence[EncodedClip]) -> Iterable[EncodedClip]:
        """What becomes of some clips, each by itself."""

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = []
        for name in map(str, rows["shard"]):
            clips = iter(self.source.read_shard(name))
            made: list[EncodedClip] = []
            while some := list(islice(clips, self.batch)):
                made += self.make(some)
            self.made.write_shard(name, made)
            counts.append(len(made))
        return {"shard": rows["shard"], "clips": np.array(counts)}

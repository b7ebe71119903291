"""A store made from another, shard by shard, by Ray Data actors; shards that are there already are not made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longtake.platform.data.latents import LatentStore
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

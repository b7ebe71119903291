"""Weights & Biases, where people compare runs; offline unless told otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from longtake.platform.train.settings import Settings


@contextmanager
def tracking(settings: Settings, project: str | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What sends a record of metrics.jsonl to the run in `project`, or None without one.

    Offline records lie in RUN/wandb, for `wandb sync`; WANDB_MODE and WANDB_API_KEY mean what they always do. A run
    that is resumed has the same id, made from its folder.
    """
    if project is None:
        yield None
        return
    import wandb

    run = wandb.init(
        project=project,
        name=settings.folder.name,
        id=hashlib.sha256(settings.run.encode()).hexdigest()[:16],
        resume="allow",
        dir=settings.folder,
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        config=dataclasses.asdict(settings),
        settings=wandb.Settings(silent=True),
    )
    try:
        yield lambda record: run.log(record, step=record["step"])
    finally:
        run.finish()

"""What a run survives: workers that are killed, nodes that are lost or reclaimed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from longtake.platform.train import checkpoint


def survive(fit: Callable[[], object], checkpoints: Path, losses: int) -> None:
    """Call `fit`, and call it again when workers were lost: it goes on from the newest checkpoint.

    losses: how many in a row to survive without a new checkpoint in between; then, and for an error of the training
    itself, which would only come again, the exception passes through.
    """
    count, reached = 0, checkpoint.reached(checkpoints)
    while True:
        try:
            fit()
            return
        except Exception as error:
            if not _workers_were_lost(error):
                raise
            before, reached = reached, checkpoint.reached(checkpoints)
            count = 1 if reached > before else count + 1
            if count > losses:
                raise
            where = f"from step {reached}" if reached else "from the start"
            print(f"a worker was lost: going on {where} ({count} of {losses} losses in a row)", file=sys.stderr)


def _workers_were_lost(error: Exception) -> bool:
    """Whether Ray Train ended because a process or node is gone, not because of what a worker raised."""
    from ray.train import NCCLHangError, PreemptionError

    if isinstance(error, NCCLHangError | PreemptionError):
        return True
    # What a worker raised keeps its own class; what Ray found out about a worker has one of Ray's. Workers whose peer
    # is gone raise as well, so one loss is enough.
    failures = getattr(error, "worker_failures", {}).values()
    return any(type(failure).__module__.partition(".")[0] == "ray" for failure in failures)

"""Teach the chunk-causal model to jump along its teacher's trajectories; run it again to resume."""

from __future__ import annotations

from longtake.platform.observe.job import run_job
from longtake.platform.train.run import run_stage


def main(argv: list[str] | None = None) -> None:
    run_stage("stage4_ode", argv, __doc__)


if __name__ == "__main__":
    run_job(main)

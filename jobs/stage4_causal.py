"""Teach the world model to make a video chunk by chunk, seeing no later one; run it again to resume."""

from __future__ import annotations

from longtake.platform.observe.job import run_job
from longtake.platform.train.run import run_stage


def main(argv: list[str] | None = None) -> None:
    run_stage("stage4_causal", argv, __doc__)


if __name__ == "__main__":
    run_job(main)

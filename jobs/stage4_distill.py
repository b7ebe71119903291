"""Distil it to chunks of four steps, by matching its teacher's videos; run it again to resume."""

from __future__ import annotations

from longtake.platform.distill.run import distil
from longtake.platform.observe.job import run_job


def main(argv: list[str] | None = None) -> None:
    distil(argv, __doc__)


if __name__ == "__main__":
    run_job(main)

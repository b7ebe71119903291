"""What happened on the way that a person should know: a line on stderr, of a worker by way of a file.

A worker's own stderr ends in Ray's logs. With LONGTAKE_NOTICES in its environment, which its children inherit, its
lines go to that file, and the process that started the run says them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FILE = "LONGTAKE_NOTICES"
_said: set[str] = set()


def say(line: str) -> None:
    """Say `line`, once a process; workers with one file say it once among them."""
    if line in _said:
        return
    _said.add(line)
    if FILE not in os.environ:
        print(line, file=sys.stderr, flush=True)
        return
    file = Path(os.environ[FILE])
    if line not in read(file):
        with file.open("a") as out:
            out.write(line + "\n")


def read(file: Path) -> list[str]:
    """The lines so far, a half-written last one left out."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]

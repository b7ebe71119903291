"""Measured figures, each with the command that measured it: docs/measurements/NAME.json.

{"command", "commit", "date", "device", "versions", "figures": {name: number}}; "series": {name: [number, ...]}, where
something was watched over time.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import numbers
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import longtake

_VERSIONS = ("torch", "triton", "ray", "deepspeed", "diffusers", "transformers", "numpy")


def write(
    name: str,
    figures: Mapping[str, float],
    command: str | None = None,
    *,
    series: Mapping[str, Sequence[float]] | None = None,
    folder: str | Path | None = None,
) -> Path:
    """Write `figures` to `folder`/`name`.json and return the path.

    command: the command line that reproduces the figures; by default the one that runs now. folder: docs/measurements
    of the source tree, or of the working directory when the package is installed.

    ValueError for a name that is not lower-case words joined by `_` or `-`, for no figures, and for a figure that is
    not a finite number.
    """
    check_name(name)
    if not figures:
        raise ValueError(f"measurement {name!r} has no figures")
    record = {
        "command": command or this_command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device(),
        "versions": versions(),
        "figures": {key: _number(key, value) for key, value in figures.items()},
    }
    if series:
        record["series"] = {key: [_number(key, value) for value in values] for key, values in series.items()}
    path = Path(folder or (longtake.source_root or Path.cwd()) / "docs" / "measurements") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def check_name(name: str) -> None:
    """ValueError unless `name` is lower-case words joined by `_` or `-`."""
    if not re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", name):
        raise ValueError(f"measurement name {name!r} must be lower-case words joined by '_' or '-'")


def this_command() -> str:
    """The running command line as it would be typed at the repository's root, without this machine's paths."""
    root = str(longtake.source_root or Path.cwd()) + os.sep
    script, *arguments = sys.argv
    script = str(Path(script).resolve()).removeprefix(root)
    if os.path.isabs(script):
        script = Path(script).name
    words = ["python", script] if script.endswith(".py") else [script]
    return shlex.join(words + [argument.replace(root, "") for argument in arguments])


def commit() -> str:
    """The source tree's commit, with `-dirty` behind it when files differ; `unknown` outside a git repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    root = longtake.source_root or Path.cwd()
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory() -> int:
    """The most memory that this process has held, bytes: the GPU's where it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Have `peak_memory` begin anew, of a GPU; of a process nothing does."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def device() -> str:
    """The accelerators, or the processor with the number of cores this process may use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return f"{cores} x {model.group(1) if model else 'CPU core'}"


def versions() -> dict[str, str]:
    """Versions of Python and of those installed packages that figures depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "longtake": longtake.__version__}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _number(key: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"figure {key!r} must be a finite number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)

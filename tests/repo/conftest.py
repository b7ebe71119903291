"""What the tests of the repository itself read: its sources."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAYERS = ("kernels", "model", "platform", "jobs", "serve")
FOLDERS = (*LAYERS, "longtake", "infra", "tests", "docs")


@pytest.fixture(scope="session")
def layers(root: Path) -> tuple[str, ...]:
    """The folders that are sub-packages of longtake."""
    return tuple(layer for layer in LAYERS if any((root / layer).rglob("*.py")))


@pytest.fixture(scope="session")
def built() -> Callable[[Path, Path], Path]:
    """Builds the wheel of a folder into another one; its file."""

    def build(source: Path, out: Path) -> Path:
        options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
        command = [sys.executable, "-m", "pip", "wheel", *options, "."]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return next(out.glob("*.whl"))

    return build


@pytest.fixture(scope="session")
def text_files(root: Path) -> list[Path]:
    """Every text file that people wrote."""
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".html", ".js", ".css"}
    inside = [path for folder in FOLDERS for path in (root / folder).rglob("*")]
    files = [path for path in [*root.glob("*"), *inside] if path.is_file() and path.suffix in kinds]
    return sorted([*files, root / "Makefile", root / ".ci" / "run"])


@pytest.fixture(scope="session")
def python_files(root: Path, text_files: list[Path]) -> list[Path]:
    return [path for path in text_files if path.suffix == ".py"]

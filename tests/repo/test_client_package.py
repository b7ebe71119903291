"""The client as a distribution of its own, which holds the very files of longtake.serve.client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import longtake

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "serve" / "client" / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site(root: Path, built: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel does. It is built from a copy, as setuptools writes beside the sources."""
    source, out = tmp_path_factory.mktemp("copy") / "serve" / "client", tmp_path_factory.mktemp("site")
    shutil.copytree(root / "serve" / "client", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    wheel = built(source, out)
    assert wheel.name.startswith("longtake_client-")
    assert not (source / "build").exists()  # it would be taken for sources
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


def alone(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python where the wheel is on the path and Longtake is not, run in a folder that holds nothing else."""
    third = Path(sys.modules["pytest"].__file__ or "").parent.parent  # where httpx and websockets are
    start = f"import sys; sys.path += [{str(site)!r}, {str(third)!r}]; sys.modules['longtake'] = None\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-S", "-c", start + command[0], *command[1:]]
    return subprocess.run(line, cwd=site, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_client_s_files_and_no_others(root, site):
    files = {path.name: path.read_bytes() for path in (root / "serve" / "client").glob("*.py")}
    assert {path.name: path.read_bytes() for path in (site / "longtake_client").glob("*")} == files
    assert {path.name for path in site.iterdir() if path.suffix != ".whl"} == {
        "longtake_client",
        f"longtake_client-{longtake.__version__}.dist-info",
    }  # nothing of `longtake`, which another distribution owns


def test_it_is_imported_without_longtake_torch_and_ray(site):
    script = (
        "import longtake_client as client, longtake_client.__main__\n"
        "print(client.Client('http://server').url, client.AsyncClient, client.LiveSession.__module__)\n"
        "print(*{'torch', 'ray', 'numpy', 'fastapi'} & set(sys.modules))"
    )
    child = alone(site, script)
    assert child.returncode == 0, child.stderr
    first, rest = child.stdout.split("\n", 1)
    assert first.startswith("http://server") and first.endswith("longtake_client.session") and not rest.strip()


def test_its_command_says_in_one_line_that_no_server_is_there(site, tmp_path):
    scripts = (next(site.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "longtake-client = longtake_client.__main__:main" in scripts
    (tmp_path / "hall.png").write_bytes(b"png")
    arguments = [str(tmp_path / "hall.png"), "--server", "http://127.0.0.1:9"]
    child = alone(site, "from longtake_client.__main__ import main; main()", *arguments)
    assert child.returncode == 2 and child.stderr.startswith("error: ") and "Traceback" not in child.stderr


def test_its_version_and_needs_are_longtake_s(root, project):
    whole = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == longtake.__version__ and project["requires-python"] == whole["requires-python"]
    assert set(project["dependencies"]) < set(whole["dependencies"])

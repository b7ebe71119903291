"""The wheel holds what the source tree holds, and nothing in the tree hides an installed module."""

from __future__ import annotations

import ast
import importlib.metadata
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

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(root: Path, layers: tuple[str, ...], built: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy because setuptools leaves its build folders in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for folder in (*layers, "longtake", "weights"):
        shutil.copytree(root / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    return built(source, out)


def test_the_package_list_equals_the_tree(root, layers, project):
    folders = {path.parent for layer in layers for path in (root / layer).rglob("*.py")}
    tree = {".".join(("longtake", *folder.relative_to(root).parts)) for folder in folders}
    # longtake.jobs and its like are packages even when only their sub-folders hold modules.
    tree |= {f"longtake.{layer}" for layer in layers} | {"longtake", "longtake.weights"}
    assert set(project["tool"]["setuptools"]["packages"]) == tree


def test_every_sub_folder_with_modules_is_a_package(root, layers):
    folders = {path.parent for layer in layers for path in (root / layer).glob("*/**/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_works_in_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import longtake, longtake.platform.cli as cli; from longtake.model import presets\n"
        "print(longtake.source_root, presets.get('tiny').name, longtake.__file__)\n"
        "cli.main(['--version'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    first, version = child.stdout.splitlines() or [child.stderr, ""]
    assert first == f"None tiny {tmp_path / 'site' / 'longtake' / '__init__.py'}"
    assert version == f"longtake {project_version(wheel)}"


def project_version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_the_wheel_holds_every_module(root, layers, wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    modules = {f"longtake/{path.relative_to(root)}" for layer in layers for path in (root / layer).rglob("*.py")}
    assert held == modules | {"longtake/__init__.py"}


def test_the_wheel_holds_the_web_page(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("longtake/serve/web/")}
    assert held == {f"longtake/{path.relative_to(root)}" for path in (root / "serve" / "web").iterdir()} != set()


def test_no_job_bears_the_name_of_an_installed_module(root):
    """`python jobs/x.py` puts jobs/ first on the path, and a working directory of Ray the root."""
    stems = {path.stem for path in [*(root / "jobs").glob("*"), *root.glob("*.py")]} - {"__pycache__", "README"}
    assert stems & (sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()) == set()


def test_only_platform_shares_a_name_with_the_standard_library(root):
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    assert folders & sys.stdlib_module_names == {"platform"}


def test_every_job_says_in_one_line_what_it_does_and_can_be_run(root):
    wrong = []
    for path in (root / "jobs").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first, *rest = (ast.get_docstring(tree) or "").split("\n")
        if (
            not first.endswith(".")
            or len(first) > 100
            or (rest and rest[0])
            or "run_job(main)" not in ast.unparse(tree)
        ):
            wrong.append(path.name)
    assert wrong == []


def test_the_lint_rule_names_every_part_of_platform(root, project):
    banned = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    parts = {path.stem for path in (root / "platform").iterdir() if not path.name.startswith(("_", "."))}
    assert {f"platform.{part}" for part in parts - {"README"}} <= set(banned)


def test_type_checkers_find_every_folder(root, layers):
    assert all((root / "typings" / "longtake" / layer).samefile(root / layer) for layer in layers)


def test_the_lock_pins_every_direct_dependency(root, project):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (root / "requirements.lock").read_text().splitlines()
    pins = {
        canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line and line[0] != "#"
    }
    extras = project["project"]["optional-dependencies"].values()
    wanted = [
        Requirement(text)
        for text in (*project["project"]["dependencies"], *(text for extra in extras for text in extra))
    ]
    assert [
        str(need) for need in wanted if not need.specifier.contains(pins.get(canonicalize_name(need.name), "0"))
    ] == []

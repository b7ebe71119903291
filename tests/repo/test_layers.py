"""Direction of dependence, read from the sources: kernels <- model <- platform <- {jobs, serve}."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

BELOW = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "platform": {"kernels", "model", "platform"},
    "jobs": {"kernels", "model", "platform", "jobs"},
    "serve": {"kernels", "model", "platform", "serve"},
}
KERNELS = {"torch", "triton"}
MODEL = {
    *KERNELS,
    "diffusers",
    "einops",
    "huggingface_hub",
    "matplotlib",
    "modelopt",
    "numpy",
    "peft",
    "PIL",
    "safetensors",
    "transformers",
}
PLATFORM = {
    *MODEL,
    "av",
    "botocore",
    "cv2",
    "deepspeed",
    "fsspec",
    "gymnasium",
    "imageio_ffmpeg",
    "matplotlib",
    "mujoco",
    "OpenGL",
    "pandas",
    "psutil",
    "pyarrow",
    "ray",
    "s3fs",
    "vizdoom",
    "wandb",
}
THIRD_PARTIES = {
    "kernels": KERNELS,
    "model": MODEL,
    "platform": PLATFORM,
    "jobs": {*PLATFORM, "httpx", "websockets"},
    "serve": {*PLATFORM, "fastapi", "httpx", "pydantic", "requests", "starlette", "uvicorn", "websockets"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == "client":
                continue  # it is installed under another name as well
            assert node.level == 0, f"{path}:{node.lineno}: write the import from longtake on"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(root: Path, layer: str) -> list[Path]:
    return sorted((root / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_itself_and_those_below(root, layer):
    wrong = []
    for path in sources(root, layer):
        for name in imported(path):
            package, _, rest = name.partition(".")
            folder = rest.partition(".")[0]
            if package == "longtake" and folder in BELOW and folder not in BELOW[layer]:
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_its_third_parties(root, layer):
    allowed = THIRD_PARTIES[layer] | sys.stdlib_module_names | {"longtake"}
    wrong = []
    for path in sources(root, layer):
        wrong += [
            f"{path.relative_to(root)} imports {name}" for name in imported(path) if name.split(".")[0] not in allowed
        ]
    assert not wrong


def test_no_file_imports_a_folder_by_its_bare_name(root, python_files):
    parts_of_platform = {path.stem for path in (root / "platform").iterdir() if not path.name.startswith("_")}
    bare = {"kernels", "model", "jobs", "serve", "infra", "tests"}
    wrong = []
    for path in python_files:
        for name in imported(path):
            first, _, rest = name.partition(".")
            if first in bare or (first == "platform" and rest.partition(".")[0] in parts_of_platform):
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong


def test_no_top_level_folder_is_a_package_of_its_own(root):
    inits = {path.parent.name for path in root.glob("*/__init__.py")}
    assert inits == {"longtake"}


def test_the_standard_librarys_platform_is_found_at_the_root(root):
    command = [sys.executable, "-c", "import platform; print(platform.system())"]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert child.stdout.strip(), child.stderr


def test_the_model_needs_neither_ray_nor_deepspeed(root):
    script = (
        "import importlib, pkgutil, sys, longtake.model\n"
        "for module in pkgutil.walk_packages(longtake.model.__path__, 'longtake.model.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*{'ray', 'deepspeed'} & set(sys.modules))"
    )
    assert printed_by(script, root) == ""


@pytest.mark.parametrize("module", ["model.pipeline", "platform.train.run", "platform.search.actors", "serve.app"])
def test_a_process_that_builds_nothing_yet_imports_neither_the_compiler_nor_diffusers(root, module):
    """Seconds, of each of the many processes of a job."""
    wrong = "{'torch._dynamo', 'diffusers', 'transformers'}"
    script = f"import sys, longtake.{module}; print(*{wrong} & set(sys.modules))"
    assert printed_by(script, root) == ""


def printed_by(script: str, root: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()

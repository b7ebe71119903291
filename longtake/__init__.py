"""Longtake: train, search and measure SANA-WM.

The code lives in the repository's top-level folders (kernels, model, platform, jobs), which are the sub-packages of
`longtake`. None of them has an `__init__.py`: a top-level `platform/` package would hide the standard library's.
A source tree therefore appends its root to `__path__`; in a wheel the folders lie inside this one already.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

source_root: Path | None = None
"""The repository's root when the package is imported from a source tree; None in an installed wheel."""

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "platform").is_dir():
    source_root = _root
    __path__.append(str(_root))


class _ModelPackage(ModuleType):
    """`longtake.model` with its public class as an attribute, loaded on first use (a namespace package has no body)."""

    def __getattr__(self, name: str) -> Any:
        if name == "WorldModel":
            return importlib.import_module("longtake.model.dit.world_model").WorldModel
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


importlib.import_module("longtake.model").__class__ = _ModelPackage

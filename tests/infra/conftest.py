"""What the tests of infra/ share: Serve configs and manifests, checked more strictly than Ray and Kubernetes do."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from longtake.serve.settings import Settings


@pytest.fixture(scope="session")
def infra(root: Path) -> Path:
    return root / "infra"


def _known(given: dict[str, Any], model: type[BaseModel]) -> None:
    if unknown := given.keys() - model.model_fields.keys():
        raise ValueError(f"{sorted(unknown)[0]}: {model.__name__} has no such field")


@pytest.fixture
def serve_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """The settings of a Serve config's text. ValueError for what is wrong, misspelt keys among it. Weights and
    keys need not be there.
    """
    monkeypatch.setattr("longtake.model.pipeline.check_folder", lambda *_: {})
    (tmp_path / "keys.json").write_text("{}")

    def check(text: str) -> Settings:
        given = yaml.safe_load(text)
        config = ServeDeploySchema.model_validate(given)
        _known(given, ServeDeploySchema)
        _known(given.get("http_options", {}), HTTPOptionsSchema)
        _known(given.get("logging_config", {}), LoggingConfig)
        for each in given["applications"]:
            _known(each, ServeApplicationSchema)
        (application,) = config.applications
        module, _, name = application.import_path.partition(":")
        if not callable(getattr(importlib.import_module(module), name, None)):
            raise ValueError(f"import_path: {module} has no {name}")
        there = {name: path for name, path in (("weights", tmp_path), ("keys", tmp_path / "keys.json"))}
        args = application.args
        return Settings.checked({**args, **{name: str(path) for name, path in there.items() if name in args}})

    return check


@pytest.fixture(scope="session")
def manifests(infra: Path) -> Callable[[str], list[dict[str, Any]]]:
    """The documents of a manifest's text. ValueError for a field that is wrong, or not one of those that we use."""
    schema = json.loads((infra / "kube" / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)

    def check(text: str) -> list[dict[str, Any]]:
        documents = list(yaml.safe_load_all(text))
        for document in documents:
            for error in validator.iter_errors(document):
                raise ValueError(f"{error.json_path}: {error.message}")
        return documents

    return check

"""Files stay short, and documents name only what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)")
PATH_IN_CODE = re.compile(r"`((?:kernels|model|platform|jobs|serve|infra|tests|docs|weights|longtake)/[\w./-]*)`")
PLACEHOLDER = re.compile(r"NAME|[A-Z]{4,}")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|opt|mnt|scratch)/\w")


def documents(text_files: list[Path]) -> list[Path]:
    return [path for path in text_files if path.suffix == ".md"]


def test_no_source_file_outgrows_one_story(root, python_files):
    lengths = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_no_text_names_a_path_of_somebodys_machine(root, text_files):
    wrong = []
    for path in text_files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    assert wrong == []


def test_links_lead_to_files_that_exist(root, text_files):
    wrong = []
    for path in documents(text_files):
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(root)}: {target}")
    assert wrong == []


def test_paths_in_documents_exist(root, text_files):
    wrong = []
    for path in documents(text_files):
        for target in PATH_IN_CODE.findall(path.read_text(encoding="utf-8")):
            if not PLACEHOLDER.search(target) and not (root / target).exists() and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(root)}: {target}")
    assert wrong == []


def test_the_readme_lists_every_job(root):
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", (root / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem.replace("_", "-") for path in (root / "jobs").glob("*.py"))


def test_every_measurement_has_its_command(root):
    wrong = []
    for path in (root / "docs" / "measurements").glob("*.json"):
        record = json.loads(path.read_text())
        if not {"command", "commit", "date", "device", "versions", "figures"} <= record.keys() or not record["command"]:
            wrong.append(path.name)
    assert wrong == []

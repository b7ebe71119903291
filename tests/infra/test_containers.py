"""The container file and compose file, read without a container engine: sources exist, versions are pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import longtake

pytestmark = pytest.mark.cpu

LAYERS = ("kernels", "model", "platform", "jobs", "serve")


def instructions(text: str) -> list[list[str]]:
    """Words of each instruction, without comments, continued lines joined. ValueError for one that there is not."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]
    for words in found:
        if words[0] not in ("ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "CMD"):
            raise ValueError(f"{words[0]}: no instruction")
    return found


def mistakes(text: str, root: Path) -> list[str]:
    """What is wrong with a container file, in one word each."""
    found = instructions(text)
    copies = [words[1:-1] for words in found if words[0] == "COPY" and not words[1].startswith("--from")]
    wrong = [source for sources in copies for source in sources if not (root / source).exists()]
    users = [words[1] for words in found if words[0] == "USER"]
    if not users or users[-1] in ("root", "0"):
        wrong.append("root")
    runs = [" ".join(words) for words in found if words[0] == "RUN"]
    wrong += ["unpinned" for run in runs if "pip install" in run and "-c requirements.lock" not in run]
    bases = [words[1] for words in found if words[0] == "FROM"]
    wrong += ["latest" for base in bases if ":" not in base or base.endswith(":latest")]
    return wrong


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "infra" / "Containerfile").read_text()


@pytest.fixture(scope="module")
def services(root: Path) -> dict:
    return yaml.safe_load((root / "infra" / "compose.yaml").read_text())["services"]


def test_the_container_file_copies_what_exists_and_pins_what_it_installs(root, text):
    assert mistakes(text, root) == []


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("COPY kernels", "COPY kernel", "kernel"),
        ("USER 1000", "USER root", "root"),
        ("USER 1000\n", "", "root"),
        ("pip install -c requirements.lock .", "pip install .", "unpinned"),
        ("python:${PYTHON}-slim-bookworm AS", "python:latest AS", "latest"),
    ],
)
def test_a_mistake_in_the_container_file_is_found(root, text, right, wrong, named):
    assert right in text
    assert named in mistakes(text.replace(right, wrong), root)


def test_the_image_holds_all_of_longtake_that_the_wheel_needs(root, text):
    copied = {source for words in instructions(text) if words[0] == "COPY" for source in words[1:-1]}
    assert {*LAYERS, "longtake", "weights", "pyproject.toml", "README.md", "LICENSE"} <= copied


def test_nothing_else_is_sent_to_the_builder(root, text):
    lines = (root / "infra" / "Containerfile.dockerignore").read_text().splitlines()
    words = [words for words in instructions(text) if words[0] == "COPY" and not words[1].startswith("--from")]
    assert lines[1] == "*" and {line[1:] for line in lines if line.startswith("!")} == {
        source for each in words for source in each[1:-1]
    }


def test_python_is_one_that_the_project_supports(root, text):
    version = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    supported = re.search(r'^requires-python = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and supported and SpecifierSet(supported[1]).contains(version[1])


def test_images_that_are_named_are_of_this_version(text, services):
    tags = re.findall(r"longtake:([\w.]+)-(?:cpu|gpu)", text)
    assert tags and set(tags) == {longtake.__version__}
    assert services["server"]["image"] == f"longtake:{longtake.__version__}-cpu"


def test_services_are_pinned_and_this_machine_s_alone(services):
    for name, service in services.items():
        assert re.search(r":\D*\d+\.\d+\.\d+|:RELEASE\.\d{4}", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_the_compose_file_names_files_services_and_a_bucket_that_exist(root, services):
    infra = root / "infra"
    build = services["server"]["build"]
    assert (infra / build["context"]).resolve() == root and (root / build["dockerfile"]).is_file()
    for service in services.values():
        assert service.get("depends_on", {}).keys() <= services.keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (infra / source).is_file() if source.startswith(".") else source in ("database", "store")
    (application,) = yaml.safe_load((infra / "serve" / "container.yaml").read_text())["applications"]
    bucket = application["args"]["store"].removeprefix("s3://").split("/")[0]
    assert services["bucket"]["command"][0].endswith(f"store/{bucket}")
    user, password = (services["store"]["environment"][f"MINIO_ROOT_{name}"] for name in ("USER", "PASSWORD"))
    given = services["server"]["environment"]
    assert (given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]) == (user, password)
    assert application["args"]["database"].startswith("/data/") and services["server"]["volumes"] == ["database:/data"]


def test_the_command_is_there(root, text):
    assert (root / "infra" / "container_serve.sh").stat().st_mode & 0o111
    assert '["container-serve", "serve/container.yaml"]' in text and "COPY infra/serve /srv/longtake/serve" in text
    assert (root / "infra" / "serve" / "container.yaml").is_file()

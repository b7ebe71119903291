"""The manifests for KubeRay: fields, what their strings hold, and whether the cluster that they ask for is enough."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

import longtake
from longtake.serve.app import VIDEOS_CPUS

pytestmark = pytest.mark.cpu

KINDS = ("api", "text", "stage1", "refiner", "decoder")


@pytest.fixture
def server(infra, manifests) -> dict[str, Any]:
    """The RayService's spec."""
    return manifests((infra / "kube" / "server.yaml").read_text())[1]["spec"]


@pytest.fixture
def training(infra, manifests) -> dict[str, Any]:
    """The RayJob's spec."""
    return manifests((infra / "kube" / "training.yaml").read_text())[0]["spec"]


def cluster(spec: dict[str, Any]) -> dict[str, Any]:
    return spec.get("rayClusterConfig") or spec["rayClusterSpec"]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster(spec)["headGroupSpec"], *cluster(spec)["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def mounts(group: dict[str, Any]) -> list[str]:
    return [each["mountPath"] for each in container(group).get("volumeMounts", [])]


def is_mounted(path: str, group: dict[str, Any]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in mounts(group))


@pytest.mark.parametrize("name", ["server", "training", "monitors"])
def test_a_manifest_has_the_fields_of_its_kind(infra, manifests, name):
    assert manifests((infra / "kube" / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("server", "serveConfigV2:", "serveConfigv2:"),
        ("server", "maxReplicas: 8", "maxReplica: 8"),
        ("server", "maxReplicas: 8", 'maxReplicas: "8"'),
        ("server", "nvidia.com/gpu", "nvidia/gpu"),
        ("server", "memory: 64Gi", "memory: 64GB"),
        ("server", "mode: token", "mode: disabled"),
        ("server", "runAsNonRoot: true", "runAsNonRoot: false"),
        ("server", "ray.io/v1", "ray.io/v1alpha1"),
        ("server", "kind: RayService", "kind: RayServe"),
        ("server", 'type: "None"', "type: null"),
        ("training", "backoffLimit", "backOffLimit"),
        ("training", "  entrypoint:", "  entryPoint:"),
        ("training", 'num-cpus: "2"', "num-cpus: 2"),
        ("training", "mountPath: /runs", "mountpath: /runs"),
        ("monitors", "port: metrics", "ports: metrics"),
    ],
)
def test_a_mistake_in_a_manifest_is_refused(infra, manifests, name, right, wrong):
    text = (infra / "kube" / f"{name}.yaml").read_text()
    assert right in text
    with pytest.raises(ValueError, match=r"\$"):
        manifests(text.replace(right, wrong))


def test_images_and_ray_are_of_this_version(root, server, training):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "requirements.lock").read_text(), re.MULTILINE))
    for spec in (server, training):
        assert cluster(spec)["rayVersion"] == pins["ray"]
        assert {container(group)["image"] for group in groups(spec)} == {f"longtake:{longtake.__version__}-gpu"}


def test_volumes_are_mounted_from_those_that_are_there(server, training):
    for group in (*groups(server), *groups(training)):
        there = [each["name"] for each in group["template"]["spec"].get("volumes", [])]
        assert sorted(there) == sorted(each["name"] for each in container(group).get("volumeMounts", []))


def test_the_service_serves_the_config_for_clusters(infra, server, serve_config):
    inner = server["serveConfigV2"]
    assert yaml.safe_load(inner) == yaml.safe_load((infra / "serve" / "cluster.yaml").read_text())
    assert serve_config(inner).config.name == "sana-wm-streaming"


def test_a_server_s_files_are_where_its_processes_run(server):
    (application,) = yaml.safe_load(server["serveConfigV2"])["applications"]
    args = application["args"]
    head, *workers = groups(server)
    assert all(is_mounted(args[name], group) for name in ("weights", "keys") for group in (head, *workers))
    assert is_mounted(args["database"], head) and not any(is_mounted(args["database"], each) for each in workers)
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == {args["database_node"]: 1}
    assert float(head["rayStartParams"]["num-cpus"]) >= VIDEOS_CPUS
    assert not any("resources" in each["rayStartParams"] for each in workers)
    port = yaml.safe_load(server["serveConfigV2"])["http_options"]["port"]
    for group in groups(server):
        assert {"containerPort": port, "name": "serve"} in container(group)["ports"]


@pytest.mark.parametrize(("count", "replicas"), [("least", "minReplicas"), ("most", "maxReplicas")])
def test_the_cluster_holds_the_replicas_that_the_settings_ask_for(server, serve_config, count, replicas):
    settings = serve_config(server["serveConfigV2"])
    scalings = [getattr(settings, kind) for kind in KINDS]
    (worker,) = cluster(server)["workerGroupSpecs"]
    limits = container(worker)["resources"]["limits"]
    for resource, needed in (("nvidia.com/gpu", "num_gpus"), ("cpu", "num_cpus")):
        wanted = sum(getattr(each, count) * getattr(each, needed) for each in scalings)
        assert wanted <= worker[replicas] * float(limits[resource])
    # Parts of a card are put together on whole ones.
    parts = sum(getattr(each, count) * each.num_gpus for each in scalings if each.num_gpus < 1)
    whole = sum(getattr(each, count) * each.num_gpus for each in scalings if each.num_gpus >= 1)
    assert whole + -(-parts // 1) <= worker[replicas]


def test_the_training_job_s_command_is_one_that_a_job_takes(training, tmp_path, capsys):
    word, name, *arguments = shlex.split(training["entrypoint"])
    assert word == "longtake"
    job = importlib.import_module(f"longtake.jobs.{name.replace('-', '_')}")
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    for group in groups(training):
        assert is_mounted(given["--init"], group) and is_mounted(given["--run"], group)
    (worker,) = cluster(training)["workerGroupSpecs"]
    gpus = worker["replicas"] * int(container(worker)["resources"]["limits"]["nvidia.com/gpu"])
    assert int(given["--workers"]) == gpus
    (tmp_path / "transformer").mkdir()
    job.main([*(str(tmp_path) if each == given["--init"] else each for each in arguments), "--dry-run"])
    assert json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        job.main([*arguments, "--wokers", "8"])


def test_the_training_job_s_environment_is_one_of_ray_s(training):
    inner = yaml.safe_load(training["runtimeEnvYAML"])
    assert inner.keys() <= RuntimeEnv.known_fields
    assert RuntimeEnv(**inner)


def test_the_monitors_look_at_ports_that_pods_have(infra, manifests, server):
    ports = {each["name"] for group in groups(server) for each in container(group)["ports"]}
    found = manifests((infra / "kube" / "monitors.yaml").read_text())
    assert {each["port"] for monitor in found for each in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_the_guide_names_the_secrets_and_volumes_that_manifests_need(infra, root):
    guide = (infra / "README.md").read_text()
    texts = [Path(root / "infra" / "kube" / f"{name}.yaml").read_text() for name in ("server", "training")]
    needed = set(re.findall(r"(?:secretRef: \{name|secretName|claimName): ([\w-]+)", "".join(texts)))
    made = set(re.findall(r"kind: PersistentVolumeClaim\nmetadata:\n  name: ([\w-]+)", "".join(texts)))
    assert needed - made and all(f"`{name}`" in guide for name in needed - made)

"""The cluster that jobs run on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray
import ray.data
from ray.data.block import DataBatch
from ray.exceptions import RayTaskError

from longtake.platform.observe import ray_cluster as cluster
from longtake.platform.observe.job import user_message

pytestmark = [pytest.mark.cpu, pytest.mark.ray]


@ray.remote
def _refuse() -> None:
    raise PermissionError("Access Denied")


@ray.remote
def _where_longtake_lies() -> str:
    import longtake

    return str(longtake.source_root)


def _refuse_batch(batch: DataBatch) -> DataBatch:
    try:
        raise OSError("unexpected end of stream")
    except OSError as error:
        raise ValueError("clip 3 has no poses") from error


def test_it_listens_on_this_machine_alone_and_has_spare_logical_cpus(ray_cluster):
    assert ray_cluster.startswith("127.0.0.1:")
    assert ray.cluster_resources()["CPU"] >= 8


def test_connecting_twice_keeps_the_cluster(ray_cluster):
    cluster.connect()
    assert ray.get_runtime_context().gcs_address == ray_cluster


def test_workers_import_the_source_tree(ray_cluster, root):
    assert ray.get(_where_longtake_lies.remote()) == str(root)


def test_a_workers_refusal_reads_like_the_drivers(ray_cluster):
    with pytest.raises(PermissionError) as error:
        ray.get(_refuse.remote())
    assert (user_message(error.value) or "").startswith("Access Denied (check AWS_ACCESS_KEY_ID")


def test_a_users_mistake_inside_ray_data_is_found(ray_cluster):
    with pytest.raises(RayTaskError) as error:
        ray.data.range(2).map_batches(_refuse_batch).materialize()
    assert user_message(error.value) == "clip 3 has no poses"


def test_a_child_process_joins_by_ray_address(ray_cluster, root):
    script = (
        "from longtake.platform.observe import ray_cluster; import ray; "
        "ray_cluster.connect(); print(ray.get_runtime_context().gcs_address)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.stdout.strip() == ray_cluster, child.stderr


def test_a_dashboards_url_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="ray job submit"):
        cluster.connect()

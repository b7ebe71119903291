"""The Serve configs: what Ray would let pass and we do not, and whether their replicas find room."""

from __future__ import annotations

import pytest

from longtake.serve.app import VIDEOS_CPUS, application
from longtake.serve.settings import Scaling, Settings

pytestmark = pytest.mark.cpu


def used(settings: Settings) -> list[Scaling]:
    """Of all deployments that are started."""
    kinds = ("api", "text", "stage1", "decoder", *(("refiner",) if settings.refines else ()))
    return [getattr(settings, kind) for kind in kinds]


@pytest.mark.parametrize(
    ("name", "preset"),
    [("one_machine", "tiny-streaming"), ("container", "tiny-streaming"), ("cluster", "sana-wm-streaming")],
)
def test_a_config_is_right_in_every_field(infra, serve_config, name, preset):
    settings = serve_config((infra / "serve" / f"{name}.yaml").read_text())
    assert settings.config.name == preset and settings.max_sessions >= 1


@pytest.mark.parametrize("name", ["one_machine", "container"])
def test_on_one_machine_all_replicas_find_room_on_two_cores(infra, serve_config, name):
    settings = serve_config((infra / "serve" / f"{name}.yaml").read_text())
    assert VIDEOS_CPUS + sum(each.most * each.num_cpus for each in used(settings)) <= 2
    assert all(each.num_gpus == 0 for each in used(settings))


def test_the_process_with_the_database_runs_where_its_disk_is(infra, serve_config):
    for name, resources in (("cluster", {"database": 0.001}), ("container", {})):
        api = application(serve_config((infra / "serve" / f"{name}.yaml").read_text()))._bound_deployment
        *_, bound = api.init_args
        videos = bound._bound_deployment
        assert videos.name == "Videos" and videos.ray_actor_options.get("resources", {}) == resources


def test_without_keys_only_this_machine_can_ask(infra):
    assert "host: 127.0.0.1" in (infra / "serve" / "one_machine.yaml").read_text()
    assert '["127.0.0.1:8000:8000"]' in (infra / "compose.yaml").read_text()  # publishes what container.yaml opens


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("max_sessions: 6", "max_sessions: 7", "stage1"),  # one more than stage 1 holds
        ("refiner: {least: 2, most: 5", "refiner: {least: 2, most: 4", "refiner"),
        ("stage1: {least: 1, most: 2", "stage1: {least: 3, most: 2", "stage1"),
        ("stage1: {least: 1, most:", "stage1: {least: 1, mots:", "mots"),
        ("max_queued:", "max_queue:", "max_queue"),
        ("    route_prefix:", "    route_prefx:", "route_prefx"),
        ("  port:", "  prot:", "prot"),
        ("proxy_location: EveryNode", "proxy_location: Everywhere", "proxy_location"),
        ("longtake.serve.app:build", "longtake.serve.app:built", "import_path"),
        ("preset: sana-wm-streaming", "preset: sana-wm", "preset"),
        ("      database: /database/videos.sqlite\n", "", "database"),
    ],
)
def test_a_mistake_in_a_config_is_refused_by_its_name(infra, serve_config, right, wrong, named):
    text = (infra / "serve" / "cluster.yaml").read_text()
    assert text.count(right) == 1
    with pytest.raises(ValueError, match=named):
        serve_config(text.replace(right, wrong))

"""Alerts and dashboard name only figures that exist, and labels that these have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from longtake.serve.metrics import BOUNDARIES, METRICS

pytestmark = pytest.mark.cpu

NAME = re.compile(r"\b(?:ray|longtake)_\w+")


def unknown(text: str, known: set[str]) -> set[str]:
    return set(NAME.findall(text)) - known


@pytest.fixture(scope="module")
def known(root: Path) -> set[str]:
    """Names of our own, from the code, and of Ray's that were seen."""
    summaries = [name for name, (kind, _) in METRICS.items() if kind == "summary"]
    parts = {f"{name}_{part}" for name in summaries for part in ("sum", "count")}
    seen = (root / "tests" / "infra" / "ray_metrics.txt").read_text().splitlines()
    return {*METRICS, *parts, *(line for line in seen if not line.startswith("#"))}


@pytest.fixture(scope="module")
def expressions(root: Path) -> list[str]:
    """Every query of the alerts and the dashboard."""
    alerts = yaml.safe_load((root / "infra" / "monitor" / "alerts.yaml").read_text())
    board = json.loads((root / "infra" / "monitor" / "grafana" / "longtake.json").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    return [*rules, *(target["expr"] for panel in board["panels"] for target in panel["targets"])]


def test_every_figure_that_is_asked_for_exists(expressions, known):
    assert len(expressions) > 20
    assert all(NAME.search(text) or text.startswith("up{") for text in expressions)
    assert [text for text in expressions if unknown(text, known)] == []


def test_a_misspelt_figure_is_found(known):
    assert unknown("rate(longtake_frames[5m])", known) == {"longtake_frames"}
    assert unknown("sum(ray_serve_num_http_requests)", known) == {"ray_serve_num_http_requests"}


def test_a_counter_is_asked_for_its_rate_and_a_gauge_is_not(expressions):
    for name, (kind, _) in METRICS.items():
        uses = [text for text in expressions if re.search(rf"\b{name}(?:_sum|_count)?\b", text)]
        rates = [text for text in uses if re.search(rf"(?:rate|increase)\({name}", text)]
        assert rates == ([] if kind == "gauge" else uses), name


def test_deployments_and_statuses_are_those_of_the_code(root, expressions):
    app = (root / "serve" / "app.py").read_text()
    for text in expressions:
        for names in re.findall(r'deployment=~?"([^"]+)"', text):
            assert all(f"{name}.options(" in app for name in names.split("|"))
        assert set(re.findall(r'application="([^"]+)"', text)) <= {"longtake"}
        assert set(re.findall(r'status="([^"]+)"', text)) <= {"completed", "failed"}
        assert set(re.findall(r'\bof="([^"]+)"', text)) <= {"made", "live", "queued"}
        assert all(float(edge) in BOUNDARIES for edge in re.findall(r"\]\)\)\) > ([\d.]+)", text))


def test_alerts_say_what_to_see_and_panels_have_a_place(root):
    alerts = yaml.safe_load((root / "infra" / "monitor" / "alerts.yaml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket") for rule in rules)
    panels = json.loads((root / "infra" / "monitor" / "grafana" / "longtake.json").read_text())["panels"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


def test_prometheus_scrapes_what_compose_runs(root):
    infra = root / "infra"
    scraped = yaml.safe_load((infra / "monitor" / "prometheus.yaml").read_text())
    services = yaml.safe_load((infra / "compose.yaml").read_text())["services"]
    ports = {"8000": "port: 8000", "8080": "--metrics-export-port=8080"}
    texts = (infra / "serve" / "container.yaml").read_text() + (infra / "container_serve.sh").read_text()
    for job in scraped["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            host, _, port = target.partition(":")
            assert host in services and ports[port] in texts
    assert {job["job_name"] for job in scraped["scrape_configs"]} >= {"longtake"}  # of the alert on `up`

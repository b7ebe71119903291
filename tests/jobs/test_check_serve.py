"""The load in its smallest form; what strangers send is in tests/serve/test_hostile.py."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import check_serve, fuzz_serve
from longtake.platform.observe.served import Replica, growth

pytestmark = [pytest.mark.cpu, pytest.mark.ray]


def test_a_dry_run_prints_the_settings_and_mistakes_are_named(capsys):
    check_serve.main(["--dry-run", "--most", "2"])
    assert "stage1.most=2" in json.loads(capsys.readouterr().out)["settings"]
    fuzz_serve.main(["--dry-run"])
    assert "max_running=1" in json.loads(capsys.readouterr().out)["settings"]
    with pytest.raises(ValueError, match="--faults"):
        check_serve.main(["--faults", "1"])
    with pytest.raises(ValueError, match="--cases"):
        fuzz_serve.main(["--cases", "0"])


def test_growth_is_that_of_replicas_that_were_seen_for_long():
    grows, new = Replica("Stage1", "a", 1), Replica("Decode", "b", 2)
    memory = {grows: [(at, round(1e9 + 2e6 * at / 60)) for at in range(0, 600, 2)], new: [(0.0, 5), (100.0, 9)]}
    assert dict(growth(memory)) == {"stage1_mb_a_minute": pytest.approx(2), "stage1_replicas_seen": 1}


@pytest.mark.timeout(600)
def test_a_small_crowd_loses_nothing_when_a_replica_is_killed(ray_cluster, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)  # to be as it was afterwards
    words = [
        "--minutes",
        "0.2",
        "--calm",
        "0",
        "--customers",
        "3",
        "--sessions",
        "2",
        "--most",
        "1",
        "--together",
        str(check_serve.RUNNING + check_serve.SESSIONS),
    ]
    check_serve.main([*words, "--kill-every", "6", "--no-write"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert int(printed["requests"]) >= 3 and int(printed["kills"]) >= 1 and int(printed["sessions"]) == 2
    assert printed["lost"] == printed["twice"] == "0"

"""What no honest client would send, and people who leave without a word: the server goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from ray import serve
from websockets.sync.client import connect

from longtake.jobs.fuzz_serve import SETTINGS, fuzzed, schema_driven
from longtake.platform.observe.hostile import KINDS, Victims, case
from longtake.platform.observe.served import picture, replicas, small_weights
from longtake.serve.__main__ import put

pytestmark = [pytest.mark.cpu, pytest.mark.ray, pytest.mark.timeout(600)]

API_TOGETHER = 8


@pytest.fixture(scope="module")
def url(start: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an application with the job's limits, that takes few requests at once and asks for no key."""
    folder = tmp_path_factory.mktemp("hostile")
    small_weights("tiny-streaming", folder / "weights")
    given: dict[str, Any] = {"weights": str(folder / "weights"), "keys": None}
    for setting in (*SETTINGS, f"api.together={API_TOGETHER}", "api.num_cpus=0.5"):
        put(given, setting)
    yield start(folder, **given)
    serve.delete("longtake")


def opened(url: str, **begin):
    socket = connect(url.replace("http", "ws", 1) + "/v1/sessions", max_size=None)
    socket.send(json.dumps(begin))
    return socket, json.loads(socket.recv())


def begun(url: str):
    socket, said = opened(url, type="start", image=base64.b64encode(picture()).decode())
    assert said["type"] == "started", said
    return socket, said["session"]


def test_cases_are_drawn_from_a_seed_and_are_of_all_kinds():
    victims = Victims("video_" + "0" * 32, "video_" + "1" * 32, "video_" + "2" * 32)
    cases = [case(3, number, victims) for number in range(200)]
    assert cases == [case(3, number, victims) for number in range(200)]
    assert {each.kind for each in cases} == set(KINDS) and cases[:9] != [case(4, n, victims) for n in range(9)]


def test_whatever_is_sent_is_answered_and_ends_no_process(url):
    before = replicas()
    found = asyncio.run(fuzzed(url, 1, range(300)))
    assert found["cases"] == 300 and found["accepted"] > 0
    assert (found["status_5xx"], found["unanswered"], found["shapeless"]) == (0, 0, 0)
    assert sorted(map(str, replicas())) == sorted(map(str, before))


def test_the_server_keeps_to_its_own_schema(url):
    cases, failures = schema_driven(url, 3)
    assert cases > 100 and failures == 0


def test_people_who_leave_while_they_are_served_take_no_place_from_others(url):
    socket, id = begun(url)
    with socket:
        for _ in range(API_TOGETHER + 2):
            opened(url, type="resume", session=id)[0].socket.close()
        socket.send(json.dumps({"type": "actions", "actions": "w-24"}))
        for _ in range(API_TOGETHER + 2):
            with httpx.stream("GET", f"{url}/v1/videos/{id}/stream", timeout=60) as stream:
                assert next(stream.iter_raw())
        assert httpx.get(f"{url}/v1/videos/{id}", timeout=60).json()["status"] == "in_progress"
    assert httpx.delete(f"{url}/v1/videos/{id}", timeout=60).status_code == 200


def test_a_session_that_ended_before_it_began_has_no_content(url):
    socket, id = begun(url)
    with socket:
        socket.send(json.dumps({"type": "end"}))
        while json.loads(socket.recv())["type"] != "closed":
            pass
    answers = {what: httpx.get(f"{url}/v1/videos/{id}{what}", timeout=60) for what in ("/content", "/stream", "")}
    assert {what: answer.status_code for what, answer in answers.items()} == {"/content": 404, "/stream": 409, "": 200}
    assert "no frames" in answers["/content"].json()["error"]["message"]
    assert httpx.delete(f"{url}/v1/videos/{id}", timeout=60).status_code == 200


@pytest.mark.parametrize("session", ["\0", "../..", "video_" + "0" * 32])
def test_what_a_session_is_forked_from_becomes_a_path_only_if_it_is_one(url, session):
    socket, said = opened(url, type="fork", session=session)
    with socket:
        assert (said["type"], said["error"]["type"], said["error"]["param"]) == ("error", "not_found_error", "session")

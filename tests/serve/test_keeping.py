"""What a server keeps: records, files, keys, settings."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os

import boto3
import pytest
import torch

from longtake.serve.guard import ANYBODY, Guard, SameOrigin
from longtake.serve.ledger import COMPLETED, QUEUED, RUNNING, Ledger, Record
from longtake.serve.requests import Refused
from longtake.serve.results import Results
from longtake.serve.settings import Settings

pytestmark = pytest.mark.cpu


def test_a_ledger_opened_again_knows_what_was_accepted(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "videos.sqlite")
    first = ledger.add(Record("video_1", "anna", {"prompt": "a hall"}, 49, "once", created_at=1.0))
    for number in range(2, 5):
        ledger.add(Record(f"video_{number}", "anna", {}, 25, created_at=float(number)))
    ledger.add(Record("video_9", "bert", {}, 25, "once"))
    ledger.update("video_1", status=RUNNING, parts=25)
    ledger.update("video_2", status=COMPLETED)
    again = Ledger(tmp_path / "deep" / "videos.sqlite")
    assert again.add(Record("video_7", "anna", {}, 1, "once")).id == first.id  # asked for once
    assert [record.id for record in again.unfinished()] == ["video_1", "video_3", "video_4", "video_9"]
    found = again.get("video_1")
    assert found is not None and (found.status, found.parts, found.request) == (RUNNING, 25, {"prompt": "a hall"})
    assert [record.id for record in again.page("anna", 2, None, True)] == ["video_4", "video_3"]
    assert [record.id for record in again.page("anna", 9, again.get("video_3"), True)] == ["video_2", "video_1"]
    assert [record.id for record in again.page("anna", 9, again.get("video_3"), False)] == ["video_4"]
    assert again.counts() == {RUNNING: 1, COMPLETED: 1, QUEUED: 3}
    again.remove("video_1")
    assert again.get("video_1") is None and again.once("anna", "once") is None


@pytest.fixture
def bucket(s3_server) -> str:
    boto3.client("s3").create_bucket(Bucket="videos")
    return "s3://videos/of/mine"


@pytest.fixture(params=["folder", "bucket"])
def results(request, tmp_path) -> Results:
    return Results(str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket"))


def test_latents_are_read_up_to_the_first_that_is_missing(results):
    written = [torch.full((1, 2, 3, 1, 1), float(number)) for number in range(4)]
    for number in (0, 1, 3):
        results.put_tensors(f"video/stage1/{number:05}", {"latents": written[number]})
    assert [torch.equal(x, y) for x, y in zip(results.latents("video/stage1"), written, strict=False)] == [True, True]
    assert results.numbered("video/stage1") == 2 and results.latents("video/refined") == []
    results.put("video/video/00000.m4s", b"x")
    assert results.numbered("video/video", ".m4s") == 1 and results.has("video/video/00000.m4s")
    results.remove("video")
    assert not results.has("video/video/00000.m4s")
    with pytest.raises(FileNotFoundError):
        results.get("video/video/00000.m4s")
    results.remove("video")


def test_a_video_can_be_removed_while_a_stage_still_writes_to_it(tmp_path, monkeypatch):
    results, rmdir = Results(str(tmp_path)), os.rmdir
    results.put("video/stage1/00000", b"x")

    def too_early(path, **options) -> None:
        """The folder is empty, and before it is gone there is another file."""
        monkeypatch.undo()
        results.put("video/stage1/00001", b"x")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", too_early)
    results.remove("video")
    assert results.has("video/stage1/00001")
    results.remove("video")
    assert not results.has("video")


@pytest.fixture
def keys(tmp_path) -> str:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "anna", "sha256": digest, "requests_per_minute": 60}]}))
    return str(path)


def test_who_has_no_key_is_refused_and_who_asks_too_often_waits(keys):
    guard = Guard(keys)
    for header in (None, "", "Bearer", "Bearer wrong", "Basic secret", "Bearer \udcff", "Bearer \ud800"):
        with pytest.raises(Refused) as refused:
            guard.check(header)
        assert refused.value.status == 401
    assert [guard.check("Bearer secret").name for _ in range(10)] == ["anna"] * 10
    with pytest.raises(Refused) as refused:
        guard.check("bearer secret")
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    assert Guard(None).check(None) is ANYBODY


@pytest.mark.parametrize("text", ["{}", "[", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "", "sha256": "0"}]}'])
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match="keys"):
        Guard(str(tmp_path / "keys.json"))


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("stage1.most", {"stage1": {"least": 3}}),
        ("stage1.mots", {"stage1": {"mots": 2}}),
        ("max_secs", {"max_secs": 3}),
        ("preset", {"preset": "tiny"}),
        ("refine", {"refine": True, "random_weights": True}),
        ("weights", {"weights": "nowhere"}),
        ("database", {"store": "s3://bucket/videos"}),
        ("keys", {"keys": "nowhere.json"}),
    ],
)
def test_settings_that_are_wrong_are_named_before_anything_starts(field, given):
    with pytest.raises(ValueError, match=field.split(".")[0] if field != "weights" else "nowhere"):
        Settings.checked(given)


@pytest.mark.parametrize(
    ("kind", "method", "headers", "passes"),
    [
        ("http", "POST", {}, True),  # no browser
        ("http", "POST", {"origin": "http://here:8000"}, True),
        ("http", "POST", {"origin": "https://proxy", "x-forwarded-host": "proxy"}, True),
        ("http", "GET", {"origin": "http://there"}, True),  # whose answer the browser keeps from that page
        ("http", "POST", {"origin": "http://there"}, False),
        ("http", "DELETE", {"origin": "null"}, False),
        ("websocket", None, {"origin": "http://here:8000"}, True),
        ("websocket", None, {"origin": "http://there"}, False),
    ],
)
def test_pages_of_other_origins_change_nothing(kind, method, headers, passes):
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope)

    async def send(message):
        sent.append(message)

    given = [(name.encode(), value.encode()) for name, value in ({"host": "here:8000"} | headers).items()]
    scope = {"type": kind, "headers": given} | ({"method": method} if method else {})
    asyncio.run(SameOrigin(app)(scope, None, send))  # type: ignore[arg-type]
    assert bool(passed) == passes
    refused = {"http": ("http.response.start", 403), "websocket": ("websocket.close", None)}[kind]
    assert passes or (sent[0]["type"], sent[0].get("status")) == refused


def test_what_is_not_given_of_a_deployment_stays_as_it_was():
    default = Settings(random_weights=True).stage1
    given = Settings.model_validate({"random_weights": True, "stage1": {"num_gpus": 1}}).stage1
    assert given == default.model_copy(update={"num_gpus": 1.0}) and default.most == 2

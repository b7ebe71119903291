"""The whole application, with a random model: what a client of OpenAI's gets, and what outlasts a killed replica."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
import ray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from websockets.sync.client import connect

import longtake.serve.client as client_package
import longtake.serve.client.__main__ as client_command
from longtake.jobs import bench_serve
from longtake.platform.observe.served import replicas
from longtake.serve.ledger import Ledger
from longtake.serve.metrics import CHUNK_SECONDS, METRICS

pytestmark = [pytest.mark.cpu, pytest.mark.ray, pytest.mark.timeout(600)]


def ask(client: openai.OpenAI, image: bytes, seconds: Any = "3", **more: Any) -> Any:
    body = {"actions": "w-16,dw-8", **more}
    return client.videos.create(
        prompt="a hall",
        seconds=seconds,
        input_reference=("a.png", image),
        extra_body=body,  # type: ignore[arg-type]
    )


def finished(client: openai.OpenAI, id: str) -> Any:
    while (video := client.videos.retrieve(id)).status in ("queued", "in_progress"):
        time.sleep(0.1)
    return video


def until_gone(folder: Path) -> None:
    """Wait until nobody writes there any more, and it is gone."""
    while folder.exists():
        time.sleep(0.1)


def frames_of(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def replica(deployment: str) -> psutil.Process:
    return next(psutil.Process(each.pid) for each in replicas() if each.deployment == deployment)


def test_openai_s_client_makes_watches_lists_and_deletes_a_video(client, server, image):
    made = ask(client, image, seed=3)
    assert (made.status, made.seconds, made.model) == ("queued", "3", "tiny-streaming")
    headers = {"Authorization": "Bearer secret"}
    with httpx.stream("GET", f"{server[0]}/v1/videos/{made.id}/stream", headers=headers, timeout=120) as stream:
        assert stream.status_code == 200 and stream.headers["content-type"] == "video/mp4"
        early = client.videos.retrieve(made.id).status
        streamed = b"".join(stream.iter_bytes())
    assert early == "in_progress"  # the stream began before the video was whole
    video = finished(client, made.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    content = client.videos.download_content(made.id).read()
    assert frames_of(streamed) == frames_of(content) == 49
    thumbnail = client.videos.download_content(made.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (96, 64)
    ranged = httpx.get(f"{server[0]}/v1/videos/{made.id}/content", headers=headers | {"Range": "bytes=4-7"})
    assert ranged.status_code == 206 and ranged.content == b"ftyp"
    poses = httpx.get(f"{server[0]}/v1/videos/{made.id}/content?variant=poses", headers=headers)
    assert np.load(io.BytesIO(poses.content))["c2w"].shape == (49, 4, 4)
    again = ask(client, image, seed=3)
    assert finished(client, again.id).status == "completed"
    assert client.videos.download_content(again.id).read() == content  # of the same seed
    listed = [video.id for video in client.videos.list(limit=1)]
    assert listed[:2] == [again.id, made.id]  # the client turned the page
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    until_gone(server[1] / made.id)


def test_refused_requests_say_why_and_others_videos_are_not_there(client, server, image):
    mine = ask(client, image, seconds="1")
    stranger = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="other", max_retries=0)
    for call in (stranger.videos.retrieve, stranger.videos.delete, stranger.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            call(mine.id)
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0), image)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, image, seconds="99")
    about = {"message": "seconds: at most 30 are made here", "type": "invalid_request_error"}
    assert refused.value.body == about | {"param": "seconds", "code": None}
    with pytest.raises(openai.ConflictError):
        ask_early = ask(client, image, seconds="30")
        client.videos.download_content(ask_early.id)
    client.videos.delete(ask_early.id)
    url, headers = f"{server[0]}/v1/videos", {"Authorization": "Bearer secret"}
    statuses = {
        "no json": httpx.post(url, headers=headers | {"Content-Type": "application/json"}, content=b"{").status_code,
        "a list": httpx.post(url, headers=headers, json=[]).status_code,
        "no form": httpx.post(url, headers=headers, content=b"hello").status_code,
        "a broken form": httpx.post(
            url, headers=headers | {"Content-Type": "multipart/form-data; boundary=x"}, content=b"--y"
        ).status_code,
        "too long": httpx.post(url, headers=headers, content=b"x" * (1 << 17)).status_code,
        "too long, unannounced": httpx.post(
            url, headers=headers | {"Content-Type": "application/json"}, content=iter([b"x" * 4096] * 64)
        ).status_code,
        "two files": httpx.post(url, headers=headers, files=[("input_reference", image), ("image", image)]).status_code,
        "no such way": httpx.get(f"{server[0]}/v1/vidoes", headers=headers).status_code,
        "no such verb": httpx.put(url, headers=headers).status_code,
        "no such id": httpx.get(f"{url}/..%2f..%2fetc", headers=headers).status_code,
    }
    expected = [400, 400, 400, 400, 413, 413, 400, 404, 405, 404]
    assert list(statuses.values()) == expected, statuses
    finished(client, mine.id)


def test_too_many_videos_are_turned_away_and_a_repeated_request_is_one(client, server, image):
    headers = {"Idempotency-Key": "once"}
    ids = {client.with_options(default_headers=headers).videos.create(
        prompt="", seconds="30", input_reference=("a.png", image), extra_body={"actions": "w-8"}  # type: ignore[arg-type]
    ).id for _ in range(3)}  # fmt: skip
    assert len(ids) == 1
    made = [*ids, *(ask(client, image, seconds="30").id for _ in range(2))]
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, image)
    assert int(refused.value.response.headers["retry-after"]) >= 1 and "3 of your videos" in str(refused.value)
    for id in made:
        client.videos.delete(id)
    figures = httpx.get(f"{server[0]}/metrics").text
    assert "longtake_videos_in_progress 0" in figures and "longtake_videos_completed" in figures


def test_a_scrape_finds_every_figure_that_is_listed_and_ray_s_port_those_of_the_stages(client, server, image):
    video = ask(client, image, seconds="1.5")
    finished(client, video.id)
    client.videos.delete(video.id)
    found = {each.name: each for each in text_string_to_metric_families(httpx.get(f"{server[0]}/metrics").text)}
    listed = {name.removesuffix("_total"): kind for name, (kind, _) in METRICS.items()}
    assert {name: each.type for name, each in found.items()} == listed
    assert all(each.samples for each in found.values())
    replicas = {each.labels["deployment"]: each.value for each in found["longtake_replicas"].samples}
    assert replicas == dict.fromkeys(["Api", "Videos", "Text", "Stage1", "Refine", "Decode"], 1)
    assert found["longtake_frames"].samples[0].value >= 25 and found["longtake_busy"].samples[0].value >= 1
    port = ray.nodes()[0]["MetricsExportPort"]
    stages: set[str] = set()
    while not {"Stage1", "Refine", "Decode"} <= stages:  # replicas report every few seconds
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        counted = [line for line in text.splitlines() if line.startswith(f"ray_{CHUNK_SECONDS}_count")]
        stages = set(re.findall(r'deployment="(\w+)"', "".join(counted)))


@pytest.mark.parametrize("deployment", ["Stage1", "Refine", "Decode", "Videos"])
def test_a_replica_that_dies_costs_nothing_that_was_made(client, server, image, deployment):
    undisturbed = ask(client, image, seconds="6", seed=7)
    finished(client, undisturbed.id)
    video = ask(client, image, seconds="6", seed=7)
    there = server[1] / video.id / "video"
    while not (there / "00001.m4s").exists():
        time.sleep(0.01)
    replica(deployment).send_signal(signal.SIGKILL)
    assert (
        finished(openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=8), video.id).status
        == "completed"
    )
    same = client.videos.download_content(video.id).read() == client.videos.download_content(undisturbed.id).read()
    assert same
    for id in (video.id, undisturbed.id):
        client.videos.delete(id)


def test_a_search_refines_the_best_of_its_candidates(client, server, image):
    """Candidates that begin alike share what they have made, and are what they are alone; so is what was refined."""
    url, store, _ = server
    headers = {"Authorization": "Bearer secret", "Idempotency-Key": "search"}
    ways = ["w-24,d-24", "w-24,a-24", "none-24"]
    body = {"candidates": json.dumps(ways), "seed": "3", "prompt": "a hall", "scores": '{"follow": 1}'}
    files = {"input_reference": ("a.png", image)}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        search = http.post("/v1/searches", data=body, files=files).json()
        assert http.post("/v1/searches", data=body, files=files).json()["id"] == search["id"]
        assert [each["actions"] for each in search["candidates"]] == ways and search["object"] == "search"
        replica("Videos").send_signal(signal.SIGKILL)
        while search["status"] in ("queued", "in_progress"):
            assert search["progress"] < 100
            time.sleep(0.2)
            if (found := http.get(f"/v1/searches/{search['id']}")).status_code != 503:
                search = found.json()
        assert search["status"] == "completed" and search["progress"] == 100, search
        made = search["candidates"]
        assert [set(each["scores"]) for each in made] == [{"follow", "sharpness", "drift", "novelty"}] * 3
        assert [each["score"] for each in made] == [each["scores"]["follow"] for each in made]
        (best,) = [each for each in made if each["kept"]]
        assert best["score"] == max(each["score"] for each in made) and not any(
            each["refined"] for each in made if each is not best
        )
        wanted = [(best["refined"], best["actions"], True), (made[1]["video"], made[1]["actions"], False)]
        for video, actions, refine in wanted:
            alone = finished(client, ask(client, image, None, actions=actions, seed=3, refine=refine).id)
            assert http.get(f"/v1/videos/{alone.id}/content").content == http.get(f"/v1/videos/{video}/content").content
        assert [each["id"] for each in http.get("/v1/searches").json()["data"]] == [search["id"]]
        assert http.get(f"/v1/searches/{search['id']}", headers={"Authorization": "Bearer other"}).status_code == 404
        assert http.delete(f"/v1/searches/{search['id']}").json()["deleted"]
        assert http.get(f"/v1/searches/{search['id']}").status_code == 404
        for each in made:
            assert http.get(f"/v1/videos/{each['video']}").status_code == 404
            until_gone(store / each["video"])
        until_gone(store / best["refined"])


def test_an_application_that_starts_again_goes_on_with_what_it_had_accepted(client, server, image):
    videos = [ask(client, image, seconds="6").id for _ in range(3)]
    there = server[1] / videos[0] / "video"
    while not (there / "00001.m4s").exists():
        time.sleep(0.01)
    serve.delete("longtake")
    before = (there / "00000.m4s").stat().st_mtime_ns
    assert (server[1] / videos[0] / "stage1" / "00000").exists()
    assert {record.id for record in Ledger(server[1] / "videos.sqlite").unfinished()} == set(videos)
    server[2]()
    assert [finished(client, id).status for id in videos] == ["completed"] * 3
    assert (there / "00000.m4s").stat().st_mtime_ns == before  # it was not made twice
    assert not (server[1] / videos[0] / "stage1").exists()  # it is of no more use


class Client:
    """Of a live session: says what it does, and keeps what it hears."""

    def __init__(self, url: str, **begin: Any) -> None:
        self.socket = connect(url.replace("http", "ws", 1) + "/v1/sessions", max_size=None)
        self.fragments: list[bytes] = []
        self.chunks: list[dict[str, Any]] = []
        self.say(**{"key": "secret", **begin})

    def say(self, **what: Any) -> None:
        self.socket.send(json.dumps(what))

    def hear(self) -> dict[str, Any]:
        said = json.loads(self.socket.recv(timeout=120))
        if said["type"] == "frames":
            fragment = self.socket.recv(timeout=120)
            assert isinstance(fragment, bytes)
            self.fragments.append(fragment)
            self.chunks.append(said)
        return said

    def until(self, kind: str) -> dict[str, Any]:
        while (said := self.hear())["type"] != kind:
            assert said["type"] not in ("error", "closed"), said
        return said

    def frames(self, count: int) -> None:
        while sum(each["frames"] for each in self.chunks) < count:
            self.hear()


@pytest.fixture
def encoded(image) -> str:
    return base64.b64encode(image).decode()


def test_a_live_session_does_what_it_is_told_and_says_so(server, client, image, encoded):
    person = Client(server[0], type="start", image=encoded, prompt="a hall", seed=3, wait=True)
    started = person.until("started")
    assert (started["size"], started["fps"], started["chunk"]) == ("96x64", 16.0, 24)
    for number, actions in enumerate(["w-16,dw-8", "w-16,dw-8", "s-24"]):
        person.say(type="actions", actions=actions, sequence=10 + number)
        assert person.until("received") == {"type": "received", "sequence": 10 + number, "chunk": number}
    person.frames(73)
    assert [(each["chunk"], each["actions"], each["sequence"]) for each in person.chunks if each["frames"] > 1] == [
        (0, "w-16,dw-8", 10), (1, "w-16,dw-8", 11), (2, "s-24", 12),
    ]  # fmt: skip
    video = client.videos.retrieve(started["session"])
    assert (video.status, video.progress) == ("in_progress", 0)
    person.say(type="end")
    assert person.until("closed")["reason"] == "ended"
    assert finished(client, video.id).seconds == "4.5"
    same = ask(client, image, seconds="3", seed=3)  # the same way, told beforehand
    assert finished(client, same.id).status == "completed"
    content = client.videos.download_content(video.id).read()
    assert frames_of(content) == frames_of(b"".join(person.fragments)) == 73
    there = server[1] / same.id / "video"
    assert (there / "00001.m4s").read_bytes() == (server[1] / video.id / "video" / "00001.m4s").read_bytes()
    path = np.load(server[1] / video.id / "path.npz")["c2w"]
    np.testing.assert_allclose(path[:49], np.load(server[1] / same.id / "path.npz")["c2w"], atol=1e-5)
    for id in (video.id, same.id):
        client.videos.delete(id)


def test_a_session_outlasts_its_connection_and_its_replica_and_branches(server, client, encoded):
    person = Client(server[0], type="start", image=encoded, seed=3)
    id = person.until("started")["session"]
    person.say(type="actions", actions="w-24")
    person.frames(25)
    person.socket.close()
    replica("Stage1").send_signal(signal.SIGKILL)
    back = Client(server[0], type="resume", session=id, fragments=len(person.fragments))
    back.until("started")
    back.say(type="actions", actions="dw-24", sequence=2)
    back.frames(24)
    assert back.chunks[0]["first"] == 25 and back.chunks[-1]["sequence"] == 2
    assert frames_of(b"".join(person.fragments + back.fragments)) == 49
    branch = Client(server[0], type="fork", session=id, chunks=1)
    assert branch.until("started")["session"] != id
    branch.say(type="actions", actions="aw-24")
    branch.frames(49)
    assert [each["actions"] for each in branch.chunks if each["frames"] > 1] == ["w-24", "aw-24"]
    assert branch.fragments[1] == person.fragments[1]  # what they have in common
    for each in (back, branch):
        each.say(type="end")
        each.until("closed")


def test_a_session_nobody_speaks_to_ends_and_says_so(server, client, encoded):
    person = Client(server[0], type="start", image=encoded)
    person.until("started")
    leavers = [Client(server[0], type="start", image=encoded) for _ in range(2)]
    left = [each.until("started")["session"] for each in leavers]
    for each in leavers:  # while their stages are being asked
        each.socket.socket.close()
    assert person.until("closed") == {"type": "closed", "reason": "idle"}
    assert [finished(client, id).status for id in left] == ["completed"] * 2


def test_a_session_is_timed_from_its_first_frame_on(server):
    first, chunk = bench_serve.session(server[0], 9, True, "secret")
    assert chunk > 0 and first > 0


def test_actions_that_come_too_early_are_dropped_where_the_client_will_have_it_so(server, encoded):
    person = Client(server[0], type="start", image=encoded)
    person.until("started")
    for number in range(12):
        person.say(type="actions", actions="w-24", sequence=number)
    answers: list[dict[str, Any]] = []
    while len(answers) < 12:
        if (said := person.hear())["type"] in ("received", "dropped"):
            answers.append(said)
    assert {each["type"] for each in answers} == {"received", "dropped"}
    chunks = [each["chunk"] for each in answers if each["type"] == "received"]
    assert chunks == list(range(len(chunks)))
    person.say(type="end")
    person.until("closed")


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"type": "begin"}, "type"),
        ({"type": "start"}, "input_reference"),
        ({"type": "start", "image": "", "seconds": 3}, "seconds"),
        ({"type": "resume", "session": "video_0"}, "session"),
        ({"type": "fork", "session": "video_0", "chunks": -1}, "chunks"),
        ({"type": "resume"}, "session"),
    ],
)
def test_a_session_that_cannot_begin_says_why(server, said, param):
    answer = Client(server[0], **said).hear()
    assert answer["type"] == "error" and answer["error"]["param"] == param
    with pytest.raises(AssertionError):
        stranger = Client(server[0], **{**said, "key": "none"})
        assert stranger.hear()["error"]["type"] != "authentication_error"


def test_our_client_makes_streams_and_saves_videos(server, image, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(image)
    told: list[int] = []
    with client_package.Client(server[0], "secret") as ours:
        video = ours.create(tmp_path / "a.png", "a hall", actions="w-24", seconds=3, seed=5)
        streamed = b"".join(ours.stream(video.id))
        assert ours.wait(video.id, lambda video: told.append(video.progress)).frames == 49 and told[-1] == 100
        ours.save(video.id, tmp_path / "a.mp4", poses=tmp_path / "a.npz")
        assert frames_of((tmp_path / "a.mp4").read_bytes()) == frames_of(streamed) == 49
        assert np.load(tmp_path / "a.npz")["c2w"].shape == (49, 4, 4)
        assert [model["id"] for model in ours.models()] == ["tiny-streaming"]
        assert video.id in [each.id for each in ours.videos()]
        ours.delete(video.id)
        with ours.live(image=image, prompt="a hall", seed=5) as session:
            assert session.act("w-24") == 0
            fragments = []
            for chunk in session.chunks():
                fragments.append(chunk.fragment)
                if chunk.first + chunk.frames == 25:
                    session.end()
            assert (session.closed, frames_of(b"".join(fragments))) == ("ended", 25)

    async def made() -> int:
        async with client_package.AsyncClient(server[0], "secret") as ours:
            video = await ours.create(image, poses=np.eye(4)[None].repeat(25, 0), intrinsics=[60, 60, 48, 32])
            await ours.wait(video.id, every=0.1)
            await ours.save(video.id, tmp_path / "b.mp4")
            await ours.delete(video.id)
            return frames_of((tmp_path / "b.mp4").read_bytes())

    assert asyncio.run(made()) == 25
    command = [str(tmp_path / "a.png"), "--actions", "w-24", "--server", server[0], "--key", "secret"]
    client_command.main([*command, "--out", str(tmp_path / "c.mp4"), "--poses", str(tmp_path / "c.npz")])
    assert frames_of((tmp_path / "c.mp4").read_bytes()) == 25 and "100 %" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        client_command.main([*command[:-1], "none"])
    assert "send a valid key" in capsys.readouterr().err

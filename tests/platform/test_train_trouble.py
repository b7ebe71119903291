"""Training reads on while its object store is in trouble, and past what is damaged."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import s3fs
from botocore import exceptions
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from longtake.platform.data import patience
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.store import DamagedShard
from longtake.platform.observe import notices
from longtake.platform.train import feed, rows, stages

pytestmark = pytest.mark.cpu

FRAMES = 17
STAGE = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=FRAMES, batch_size=2)
POSES, PINHOLES = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1)), np.full((FRAMES, 4), 32, np.float32)


class Server:
    """An object store that meets the next GETs with `faults`: a status, or "reset" for a connection that is lost."""

    def __init__(self) -> None:
        self.faults: deque[str] = deque()
        self.app = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.start()

    def start(self) -> None:
        self.server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] != "GET" or not self.faults:
            return self.app(environ, start_response)
        fault = self.faults.popleft()
        if fault == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(f"{fault} Trouble", [("Content-Length", "0")])
        return []


@pytest.fixture
def server(s3_server, monkeypatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(notices, "_said", set())
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint that it has met first
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def opened(small_config):
    """The clips of a store."""
    return lambda uri: feed.open_source(STAGE, small_config, uri)


def forget_open_files() -> None:
    rows._files = threading.local()


def write(uri: str, name: str, clips: int = 3, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    latents = [rng.normal(size=(16, 3, 2, 3)).astype(np.float16) for _ in range(clips)]
    LatentStore(uri).write_shard(name, [EncodedClip(f"{name}{i}", x, POSES, PINHOLES) for i, x in enumerate(latents)])


@pytest.fixture
def bucket(server) -> str:
    """A store of two shards in a bucket."""
    boto3.client("s3").create_bucket(Bucket="trouble")
    for name in "ab":
        write("s3://trouble/latents", name, seed=ord(name))
    return "s3://trouble/latents"


@pytest.mark.parametrize("faults", [["503"] * 3, ["500", "429"], ["reset"] * 3])
def test_reading_goes_on_after_trouble(faults, server, bucket, opened):
    source = opened(bucket)
    calm = source.batch(0, 6)
    forget_open_files()
    server.faults.extend(faults)
    np.testing.assert_array_equal(source.batch(0, 6)["latents"], calm["latents"])
    assert not server.faults
    forget_open_files()
    names = [f"{bucket}/{name}.parquet" for name in "ab"]
    server.faults.extend(faults)
    assert len(rows.index_rows(names)) == 6 and not server.faults


def test_a_server_that_restarts_is_waited_for_and_the_wait_is_said(server, bucket, opened, monkeypatch, capfd):
    source = opened(bucket)
    calm = source.batch(0, 6)["latents"]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            server.start()

    monkeypatch.setattr(patience.time, "sleep", wait)
    forget_open_files()
    server.stop()
    np.testing.assert_array_equal(source.batch(0, 6)["latents"], calm)
    assert waits == [0.01, 0.02, 0.04]
    said = capfd.readouterr().err
    assert "s3://trouble does not answer" in said and len(said.splitlines()) == 1


def test_a_server_that_stays_away_ends_in_one_line(server, bucket, opened, monkeypatch):
    source = opened(bucket)
    monkeypatch.setattr(patience, "_LIMIT", 0.0)
    forget_open_files()
    server.stop()
    with pytest.raises(ConnectionError, match=r"\.parquet could not be read for .*: is the object store running\?"):
        source.batch(0, 6)
    server.start()


@pytest.mark.parametrize("what", ["denied", "missing"])
def test_what_no_waiting_mends_is_not_waited_for(what, server, bucket, opened, monkeypatch):
    source = opened(bucket)
    monkeypatch.setattr(patience.time, "sleep", lambda _: pytest.fail("waited"))
    forget_open_files()
    if what == "denied":
        server.faults.extend(["403"] * 9)
    else:
        boto3.client("s3").delete_object(Bucket="trouble", Key="latents/a.parquet")
    with pytest.raises(PermissionError if what == "denied" else FileNotFoundError):
        source.batch(0, 6)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (exceptions.ReadTimeoutError(endpoint_url="s3"), True),
        (exceptions.ConnectTimeoutError(endpoint_url="s3"), True),
        (exceptions.EndpointConnectionError(endpoint_url="s3"), True),
        (exceptions.ConnectionClosedError(endpoint_url="s3"), True),
        (TimeoutError(), True),
        (exceptions.SSLError(endpoint_url="s3", error="a certificate of another host"), False),
        (exceptions.NoCredentialsError(), False),
        (FileNotFoundError("a.parquet"), False),
        (ValueError("no column"), False),
    ],
)
def test_only_what_passes_is_waited_for(error, passes):
    assert (patience._trouble(error) is not None) == passes


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_truncated_shard_is_said_and_left_out(where, tmp_path, server, opened, capfd):
    uri, other = str(tmp_path / "latents"), str(tmp_path / "whole")
    write(uri, "a", seed=1)
    write(other, "a", seed=1)
    write(uri, "b", seed=2)
    shard = Path(uri, "b.parquet")
    shard.write_bytes(shard.read_bytes()[:-200])
    if where == "bucket":
        boto3.client("s3").create_bucket(Bucket="cut")
        s3fs.S3FileSystem().put(f"{uri}/", "s3://cut/latents", recursive=True)
        uri = "s3://cut/latents"
    source, whole = (opened(each) for each in (uri, other))
    assert capfd.readouterr().err.count("b.parquet is not a whole shard") == 1
    for start in range(0, 12, 4):
        np.testing.assert_array_equal(source.batch(start, 4)["latents"], whole.batch(start, 4)["latents"])


def test_a_row_damaged_later_is_replaced_by_the_same_other_row_everywhere(tmp_path, opened, monkeypatch, capfd):
    monkeypatch.setattr(notices, "_said", set())
    for n in range(6):  # a shard each, so that one row can be damaged
        write(str(tmp_path), f"{n}", clips=1, seed=n)
    source = opened(str(tmp_path))
    calm = source.read(np.arange(6))["latents"]
    data = bytearray((tmp_path / "2.parquet").read_bytes())
    at = data.index(calm[2].tobytes())
    data[at + 5] ^= 0x10  # which only a checksum can tell from the truth
    (tmp_path / "2.parquet").write_bytes(data)
    found = opened(str(tmp_path)).read(np.arange(6))["latents"]
    stand_in = [n for n in range(6) if np.array_equal(found[2], calm[n])]
    assert len(stand_in) == 1 and stand_in != [2]
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(calm, 2, axis=0))
    others = np.array([5, 2, 2])  # in another batch, and twice
    elsewhere = opened(str(tmp_path)).read(others)["latents"]
    np.testing.assert_array_equal(elsewhere, calm[[5, *stand_in, *stand_in]])
    assert capfd.readouterr().err.count("2.parquet is damaged") == 1


def test_nothing_but_damage_is_an_error(tmp_path, opened):
    for name in "ab":
        write(str(tmp_path), name)
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedShard, match=r"a\.parquet is not a whole shard"):
        opened(str(tmp_path))


def test_what_workers_say_is_shown_once_by_the_process_that_started_them(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(notices, "_said", set())
    with monkeypatch.context() as worker:
        worker.setenv(notices.FILE, str(tmp_path / "notices.txt"))
        for said in (set(), set()):  # two workers
            worker.setattr(notices, "_said", said)
            notices.say("a.parquet is damaged")
    assert notices.read(tmp_path / "notices.txt") == ["a.parquet is damaged"] and not capfd.readouterr().err
    for line in notices.read(tmp_path / "notices.txt") * 2:
        notices.say(line)
    assert capfd.readouterr().err == "a.parquet is damaged\n"

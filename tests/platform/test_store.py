"""Clips in a folder and in a bucket: they come back as they were, shards are whole or absent, faults are told."""

from __future__ import annotations

import errno
import io
import os
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
import s3fs

from longtake.platform.data import store as store_module
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore, decode_clip, encode_clip

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

COLUMNS = ("key", "fps", "caption", "metric_scale", "licence", "provenance", "split", "actions")


def make_clip(key: str, frames: int = 5, **fields) -> Clip:
    """A smooth random video; its poses are no rigid motions, so that every number of them shows."""
    rng = np.random.default_rng(len(key) + frames)
    video = np.stack([cv2.GaussianBlur(f, (0, 0), 3) for f in rng.integers(0, 256, (frames, 24, 40, 3), np.uint8)])
    about = dict(fps=15.5, caption="a hall", metric_scale=0.25, licence="MIT", provenance={"from": ["a", 1, None]})
    return Clip(key, video, rng.normal(size=(frames, 4, 4)), rng.normal(size=(frames, 4)), **{**about, **fields})


def same(found: Clip, clip: Clip) -> bool:
    """Equal, but for what JPEG costs the frames."""
    near = np.abs(found.frames.astype(int) - clip.frames).mean() < 1.5
    exact = np.array_equal(found.c2w, clip.c2w) and np.array_equal(found.intrinsics, clip.intrinsics)
    return near and exact and all(getattr(found, name) == getattr(clip, name) for name in COLUMNS)


@pytest.fixture
def local(tmp_path) -> ClipStore:
    return ClipStore(tmp_path / "clips")


@pytest.fixture
def bucket(s3_server, request) -> ClipStore:
    name = f"clips-{zlib.crc32(request.node.name.encode())}"
    boto3.client("s3").create_bucket(Bucket=name)
    return ClipStore(f"s3://{name}/some/where/")


@pytest.fixture(params=["local", "bucket"])
def store(request) -> ClipStore:
    return request.getfixturevalue(request.param)


def test_clips_come_back_as_they_were_stored(store):
    train, test = make_clip("hall/0"), make_clip("hall/1", 7, split="test", actions="w-4,dw-2")
    store.write_shard("b", [test])
    store.write_shard("a", [train])
    assert store.shards() == ["a", "b"] and len(store) == 2
    assert store.keys() == ["hall/0", "hall/1"] and store.keys("test") == ["hall/1"]
    assert [same(found, clip) for found, clip in zip(store.clips(), (train, test), strict=True)] == [True, True]
    assert same(store.read("hall/1"), test)
    assert [clip.key for clip in store.clips("train", "MIT")] == ["hall/0"]
    assert list(store.clips(licence="CC0-1.0")) == []
    with pytest.raises(ValueError, match="no clip 'hall/2'"):
        store.read("hall/2")


def test_a_shard_is_replaced_whole_or_not_at_all(store):
    def broken() -> Iterator[Clip]:
        yield make_clip("new")
        raise RuntimeError("the engine died")

    store.write_shard("a", [make_clip("old")])
    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="engine died"):
            store.write_shard(name, broken())
    assert store.shards() == ["a"] and same(store.read("old"), make_clip("old"))
    if not store.uri.startswith("s3:"):
        assert os.listdir(store.uri) == ["a.parquet"]
    store.write_shard("a", [make_clip("new")])
    assert store.keys() == ["new"]


def test_shards_that_could_not_be_told_apart_are_refused(local):
    with pytest.raises(ValueError, match="two clips .* key 'x'"):
        local.write_shard("a", [make_clip("x"), make_clip("y"), make_clip("x")])
    with pytest.raises(ValueError, match="at least one clip"):
        local.write_shard("a", [])
    for name in ("", ".hidden", "up/../a", "a b", "_a"):
        with pytest.raises(ValueError, match="must be made of letters"):
            local.write_shard(name, [make_clip("x")])
    assert local.shards() == []


def test_other_files_and_folders_are_passed_over(local):
    local.write_shard("a", [make_clip("x")])
    for name in (".b.parquet", "_c.parquet", "notes.txt"):
        (Path(local.uri) / name).write_text("not a shard")
    (Path(local.uri) / "preview").mkdir()
    assert local.shards() == ["a"] and local.keys() == ["x"]


def test_an_empty_store_says_how_to_fill_it(store):
    assert store.shards() == []
    for read in (store.keys, store.__len__, lambda: next(store.clips()), lambda: store.read("x"), store.dataset):
        with pytest.raises(ValueError, match="longtake render-worlds --store " + store.uri):
            read()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:4] + b"\xff" * 99 + data[103:],
        lambda data: data.replace(b"\xff\xd8\xff", b"\0\0\0"),
    ],
    ids=["cut", "empty", "page", "picture"],
)
def test_a_damaged_shard_is_named(local, damage):
    local.write_shard("a", [make_clip("x")])
    local.write_shard("b", [make_clip("y")])
    shard = Path(local.uri, "b.parquet")
    shard.write_bytes(damage(shard.read_bytes()))
    for read in (lambda: list(local.clips()), lambda: local.read("y")):
        with pytest.raises(ValueError, match="clips/b.parquet is .*: delete it and make it again"):
            read()
    assert next(local.clips()).key == "x"


def test_a_full_disk_leaves_the_shards_before_it_whole(local, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > 4000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    local.write_shard("a", [make_clip("x")])
    monkeypatch.setattr(store_module, "open", lambda path, _: FullDisk(path, "w"), raising=False)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left") as error:
            local.write_shard(name, [make_clip("y"), make_clip("z", 40)])
        assert error.value.errno == errno.ENOSPC
    assert os.listdir(local.uri) == ["a.parquet"] and same(local.read("x"), make_clip("x"))


@pytest.fixture
def denied(s3_server, monkeypatch) -> Iterator[ClipStore]:
    """A bucket of a server that answers every request with 403."""

    class Denier(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers the uploads' "Expect: 100-continue"

        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = refuse

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Denier)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint that it has met first
    yield ClipStore("s3://bucket/clips")
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_denied_access_names_the_credentials(denied):
    for access in (denied.shards, lambda: next(denied.clips()), lambda: denied.write_shard("a", [make_clip("x")])):
        with pytest.raises(PermissionError, match="bucket/clips.* denied: check AWS_ACCESS_KEY_ID"):
            access()


def test_a_part_of_a_clip_has_its_own_poses_and_no_actions():
    clip = make_clip("x", 6, actions="w-5")
    row = encode_clip(clip)
    part = decode_clip(row, 2, 4)
    assert part.actions is None and np.array_equal(part.frames, decode_clip(row).frames[2:4])
    assert np.array_equal(part.c2w, clip.c2w[2:4]) and np.array_equal(part.intrinsics, clip.intrinsics[2:4])
    assert decode_clip(row, 0, 6).actions == "w-5" and len(decode_clip(row, 4, 99)) == 2
    with pytest.raises(ValueError, match="6 frames, none in"):
        decode_clip(row, 6, 8)


def test_only_the_frames_of_a_part_are_decoded():
    row = encode_clip(make_clip("x", 4))
    row["frames"][3] = b"not a picture"
    assert len(decode_clip(row, 0, 3)) == 3
    with pytest.raises(OSError, match="cannot identify"):
        decode_clip(row, 1, 4)


def test_a_dataset_is_filtered_by_split_and_licence(ray_cluster, store):
    clips = [
        make_clip(f"{licence}-{split}", split=split, licence=licence)
        for licence in ("MIT", "CC0-1.0")
        for split in ("train", "test")
    ]
    store.write_shard("a", clips[:3])
    store.write_shard("b", clips[3:])
    rows = store.dataset(split="test", licence="CC0-1.0").take_all()
    assert len(rows) == 1 and same(decode_clip(rows[0]), clips[3])


def test_a_row_of_another_kind_is_no_clip():
    with pytest.raises(ValueError, match="a row without 'frames' is no clip: give a store made by"):
        decode_clip({"key": "encoded", "latents": b""})

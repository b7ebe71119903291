"""Files, videos, tables and pages of a search's folder."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from longtake.platform.store import files
from longtake.platform.store.dataset import KINDS, write_dataset
from longtake.platform.store.page import write_page
from longtake.platform.store.run_folder import RunFolder
from longtake.platform.store.table import write_table
from longtake.platform.store.video import encode_video, read_video, write_video

pytestmark = pytest.mark.cpu

SCORES = {"follow": 0.9, "sharpness": 0.8, "drift": 0.1}


def record(key: str, **changes: object) -> dict:
    known = {
        "key": key,
        "purpose": "search",
        "image": "hall",
        "caption": "<b>",
        "trajectory": "w-80",
        "actions": "w-80",
    }
    known |= {"seed": 0, "fps": 16.0, "num_frames": 9, "licence": "CC0-1.0", "provenance": {"model": "tiny"}}
    return known | {"scores": SCORES} | changes


def fill(run: RunFolder, key: str, refine: bool = False, **changes: object) -> None:
    c2w = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
    c2w[:, 2, 3] = np.linspace(0, 2, 9)
    run.write_rollout(key, np.zeros((4, 2, 2, 3)), c2w, np.full((9, 4), 50, np.float32))
    run.write_record(key, record(key, **changes))
    if refine:
        run.write_refined(key, b"video", {"scores": SCORES, "provenance": {"refined": True}})


def moving(frames: int = 17) -> np.ndarray:
    """A colourful smooth picture that shifts."""
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 160, 3), dtype=np.uint8), (0, 0), 6)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    return np.stack([picture[:, 2 * i : 2 * i + 96] for i in range(frames)])


@pytest.mark.parametrize("sizes", [(17,), (1, 8, 8)])
def test_a_video_holds_its_frames_in_their_colours(tmp_path, sizes):
    frames = moving()
    assert write_video(tmp_path / "v.mp4", np.split(frames, np.cumsum(sizes)[:-1]), fps=16) == 17
    read = read_video(tmp_path / "v.mp4")
    assert read.shape == frames.shape
    assert np.abs(read.astype(float) - frames).mean() < 4
    assert np.abs((read.astype(float) - frames).mean((0, 1, 2))).max() < 2


def test_a_video_that_fails_half_way_leaves_no_file(tmp_path):
    def broken():
        yield moving()[:8]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "v.mp4", broken(), fps=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 64, 96, 3), (3, 63, 96, 3)])
def test_videos_that_h264_cannot_hold_are_refused(shape):
    with pytest.raises(ValueError):
        encode_video([np.zeros(shape, np.uint8)], fps=16)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    files.write(tmp_path / "results.parquet", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "results.parquet", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.parquet", "old")]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    RunFolder(tmp_path).close()
    (tmp_path / "records" / ".k.7.part.json").write_text("{")
    run = RunFolder(tmp_path)
    assert run.finished() == [] and list((tmp_path / "records").iterdir()) == []


def test_two_searches_do_not_share_a_folder(tmp_path):
    first = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another search"):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path)


def select(run: RunFolder, *keys: str, **weights: float) -> None:
    rows = [{"key": key, "total": 0.5, "novelty": 0.1, "selected": key in keys} for key in run.finished()]
    run.write_selection({"top_k": 1, "weights": weights or {"follow": 1}, "images": {"hall": rows}})


def test_the_table_lists_candidates_best_first_and_marks_the_selected(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, "low", scores=SCORES | {"follow": 0.2})
    fill(run, "high", refine=True)
    select(run, "high", follow=1, novelty=1)
    fill(run, "minute", refine=True, purpose="long", image="a")
    rows = pq.read_table(write_table(run)).to_pylist()
    assert [(row["key"], row["selected"], row["video"]) for row in rows] == [
        ("high", True, "refined/high.mp4"),
        ("low", False, None),
        ("minute", True, "refined/minute.mp4"),
    ]
    assert np.reshape(rows[0]["c2w"], (9, 4, 4))[-1, 2, 3] == 2
    assert rows[0]["provenance"] == '{"model": "tiny", "refined": true}'
    assert rows[1]["refined_total"] is None
    assert [row["novelty"] for row in rows] == [0.1, 0.1, None]
    assert [row["total"] for row in rows] == pytest.approx([(0.9 + 0.1) / 2, (0.2 + 0.1) / 2, 0.9])


def test_a_table_that_did_not_change_is_not_written_again(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, "one")
    page = write_page(write_table(run))
    before = [path.stat().st_ino for path in (page, tmp_path / "results.parquet")]
    assert [path.stat().st_ino for path in (write_page(write_table(run)), tmp_path / "results.parquet")] == before


class _Links(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_the_table_alone_and_links_to_nothing_outside(tmp_path):
    run = RunFolder(tmp_path / "run")
    fill(run, "one", refine=True)
    moved = tmp_path / "moved" / "results.parquet"
    moved.parent.mkdir()
    moved.write_bytes(write_table(run).read_bytes())
    found = _Links(write_page(moved))
    assert set(found.links) == {"results.parquet", "refined/one.mp4"}
    assert found.tags.count("video") == 1 and found.tags.count("svg") == 2
    assert "b" not in found.tags and "script" not in found.tags


def test_the_page_shows_a_tree_by_its_branches(tmp_path):
    run = RunFolder(tmp_path)
    for key, branches in (("a", ["w-8", "d-8"]), ("b", ["w-8", "w-8"]), ("c", ["d-8", "d-8"])):
        fill(run, key, refine=key == "b", branches=branches)
    select(run, "b")
    page = write_page(write_table(run), "budget: 2.0 of 1.0 s of rollouts spent").read_text()
    assert page.count("<li>") == 2 + 2 and page.count("<li class=chosen>") == 1 and "Tree of hall, seed 0" in page
    assert "<p>Budget: 2.0 of 1.0 s of rollouts spent.</p>" in page


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_holds_the_selected_and_is_the_same_whatever_was_made_first(tmp_path, kind):
    found = []
    for name, keys in (("one", "abc"), ("other", "cba")):
        run = RunFolder(tmp_path / name)
        for key in keys:
            fill(run, key, refine=True)
        select(run, "a", "c")
        folder = write_dataset(write_table(run), kind, rows_of_shard=1)
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        assert write_dataset(run.path / "results.parquet", kind) == folder and len(list(folder.glob("0*"))) == 1
    assert found[0] == found[1] and len(found[0]) == (2 if kind == "webdataset" else 4)


def test_a_sample_of_a_web_data_set_is_a_video_and_what_is_known_of_it(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, "a", refine=True)
    select(run, "a")
    with tarfile.open(write_dataset(write_table(run), "webdataset") / "00000.tar") as tar:
        assert tar.getnames() == ["a.json", "a.mp4"] and all(member.mtime == 0 for member in tar)
        content = [tar.extractfile(name) for name in tar.getnames()]
        about, video = (file.read() for file in content if file is not None)
    sample = json.loads(about)
    assert video == b"video" and np.shape(sample["c2w"]) == (9, 4, 4) and np.shape(sample["intrinsics"]) == (9, 4)
    assert sample["c2w"][-1][2][3] == 2 and sample["provenance"] == {"model": "tiny", "refined": True}
    wanted = {"key": "a", "licence": "CC0-1.0", "fps": 16, "actions": "w-80", "caption": "<b>", "refined_follow": 0.9}
    assert {name: sample[name] for name in wanted} == wanted


def test_a_data_set_of_the_other_kind_takes_the_place_of_one(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, "a", refine=True)
    select(run, "a")
    table = write_table(run)
    write_dataset(table, "webdataset")
    folder = write_dataset(table, "parquet")
    assert [path.name for path in sorted(folder.glob("0*"))] == ["00000.parquet"]
    row = pq.read_table(folder / "00000.parquet").to_pylist()[0]
    assert (folder / row["video"]).read_bytes() == b"video"
    with pytest.raises(ValueError, match="unknown kind of data set 'tar'"):
        write_dataset(table, "tar")

"""The search from images to page, with a model of random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from longtake.jobs import search_refine
from longtake.platform.data.store import ClipStore
from longtake.platform.observe.job import run_job
from longtake.platform.store.video import read_video

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

KILL = """
import os, signal, sys
from longtake.jobs import search_refine
count, log, replace = int(sys.argv[1]), open(sys.argv[2], "a", buffering=1), os.replace
def counted(source, target):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    print(target, file=log)
os.replace = counted
search_refine.main(sys.argv[3:])
"""


@pytest.fixture
def command(small_weights, tmp_path) -> list[str]:
    return [
        "--weights",
        str(small_weights),
        "--actions",
        "w-16",
        "--actions",
        "d-16",
        "--long",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]


def test_a_search_leaves_videos_table_page_and_clips(ray_cluster, command, tmp_path, capsys):
    search_refine.main([*command, "--seeds", "2", "--batch-size", "2"])
    out = tmp_path / "out"
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert len(rows) == 2 * 2 * 2 + 1
    assert sum(row["selected"] for row in rows) == 3
    for image in ("hall", "yard"):
        of_image = [row for row in rows if row["image"] == image and row["purpose"] == "search"]
        assert [row["selected"] for row in of_image] == [True, False, False, False]
        assert of_image[0]["total"] == max(row["total"] for row in of_image)
        assert read_video(out / of_image[0]["video"]).shape == (17, 64, 96, 3)
    long = rows[-1]
    assert (long["purpose"], long["num_frames"]) == ("long", 33)
    assert np.reshape(long["c2w"], (-1, 4, 4)).shape == (33, 4, 4)
    assert {row["licence"] for row in rows} == {"CC0-1.0"}
    clips = list(ClipStore(out / "clips").clips())
    assert sorted(clip.key for clip in clips) == sorted(row["key"] for row in rows if row["selected"])
    page = (out / "index.html").read_text()
    assert page.count("<video") == 3 and "a hall &lt;with&gt; columns" in page and "<script" not in page
    assert capsys.readouterr().out.endswith(f"page: {out / 'index.html'}\n")


def test_killed_at_any_moment_it_continues_and_makes_nothing_twice(ray_cluster, command, root, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", KILL, "10", str(log), *command]
    child = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/[!.]*")}
    assert len(before) >= 6
    search_refine.main(command)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert {path: after[path] for path in before} == before
    written = [line for line in log.read_text().splitlines() if Path(line).parent != out]
    assert len(written) == len(set(written))
    assert [path for path in after if ".part" in path.name] == []
    assert len(list((out / "records").glob("*.json"))) == 5 and len(list((out / "refined").glob("*.mp4"))) == 3

    search_refine.main(command)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == {
        path: stamp for path, stamp in after.items() if path.name != ".lock"
    }


def files_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_steps_on_their_own_make_what_they_make_together(ray_cluster, command, tmp_path, capsys):
    command = [*command, "--long", "0"]
    apart, together = [*command, "--out", str(tmp_path / "apart")], [*command, "--out", str(tmp_path / "together")]
    with pytest.raises(ValueError, match="no rollouts of these candidates: run --step search first"):
        search_refine.main([*apart, "--step", "select"])
    with pytest.raises(ValueError, match="no selection: run --step select first"):
        search_refine.main([*apart, "--step", "refine"])
    search_refine.main([*apart, "--step", "search"])
    out = tmp_path / "apart"
    assert len(list(out.glob("records/*.json"))) == 4 and not (out / "selection.json").exists()
    assert list(out.glob("refined/*")) == []

    rollouts = files_of(out / "rollouts")
    search_refine.main([*apart, "--step", "select", "--top-k", "2", "--score", "drift=-1"])
    assert "selection: 4 of 4 scored candidates" in capsys.readouterr().out
    search_refine.main([*apart, "--step", "select"])
    selection = (out / "selection.json").read_bytes()
    search_refine.main([*apart, "--step", "refine", "--top-k", "2"])  # what was selected, not what would be now
    assert (out / "selection.json").read_bytes() == selection and files_of(out / "rollouts") == rollouts
    assert len(list(out.glob("refined/*.mp4"))) == 2
    with pytest.raises(ValueError, match="was selected from other candidates"):
        search_refine.main([*apart, "--step", "refine", "--seed", "7"])

    search_refine.main(together)
    for name in ("selection.json", "results.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_when_the_budget_is_spent_no_rollout_begins_and_the_best_so_far_are_refined(
    ray_cluster, command, tmp_path, capsys
):
    command = [*command, "--budget", "0.001"]
    search_refine.main(command)
    out = tmp_path / "out"
    assert len(list((out / "records").glob("*.json"))) == 1 and len(list((out / "refined").glob("*.mp4"))) == 1
    assert "3 candidates were not rolled out" in capsys.readouterr().out
    assert "3 candidates were not rolled out" in (out / "index.html").read_text()
    before = files_of(out)
    search_refine.main(command)
    assert files_of(out) == before and "0 videos made or refined" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_touches_nothing(command, tmp_path, capsys):
    search_refine.main([*command, "--dry-run", "--seeds", "3"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"]["images"] == ["hall", "yard"] and plan["plan"]["candidates"] == 12
    assert plan["config"]["image_size"] == [64, 96]
    assert not (tmp_path / "out").exists()


def refusal(arguments: list[str], capsys) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run_job(search_refine.main, arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--weights", "nowhere"], "nowhere"),
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--actions", "w-15"], "16 poses: give a multiple of 8 and one more, such as 17"),
        (["--actions", "q-16"], "unknown keys"),
        (["--images", "missing.png"], "missing.png"),
        (["--images", __file__], "cannot be read as an image"),
        (["--trajectory", "missing.npy"], "missing.npy"),
        (["--score", "sharpnes=1"], "did you mean 'sharpness'"),
        (["--budget", "0"], "--budget must be more than 0 seconds"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--out", __file__], "is a file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(command, extra, says, capsys):
    assert says in refusal([*command, *extra], capsys)


def test_weights_of_another_shape_are_named_by_the_worker(ray_cluster, small_weights, command, tmp_path, capsys):
    broken = tmp_path / "broken"
    for path in small_weights.rglob("*"):
        if path.is_file():
            target = broken / path.relative_to(small_weights)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 96, "num_heads": 3}))
    with pytest.raises(SystemExit) as end:
        run_job(search_refine.main, [*command, "--weights", str(broken)])
    assert end.value.code == 2
    assert "has shape" in capsys.readouterr().err.splitlines()[-1]

"""The job that makes one video."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longtake.jobs import generate
from longtake.model.camera import Trajectory
from longtake.platform.store.video import read_video

pytestmark = pytest.mark.cpu


@pytest.fixture
def given(small_weights, tmp_path):
    image, out = small_weights / "images" / "hall.png", tmp_path / "out" / "hall.mp4"
    return ["--image", str(image), "--weights", str(small_weights), "--out", str(out)], out


def test_a_video_and_its_poses_are_written(given, capsys):
    arguments, out = given
    generate.main([*arguments, "--actions", "w-8,d-8", "--seconds", "1.5"])
    video, path = read_video(out), Trajectory.load(out.with_suffix(".npz"))
    assert video.shape == (25, 64, 96, 3)
    assert path.num_frames == 25 and path.actions == "w-8,d-8,w-8"
    shown = capsys.readouterr()
    assert "can be watched" in shown.out and "1.6 s of video" in shown.out
    assert "stage 1 1/1 steps" in shown.err and "refine 4/4" in shown.err and "decode 4/4" in shown.err
    assert sorted(file.name for file in out.parent.iterdir()) == ["hall.mp4", "hall.npz"]


def test_a_video_may_be_made_in_float8(given, tmp_path):
    arguments, out = given
    generate.main([*arguments, "--actions", "w-8"])
    generate.main([*arguments, "--actions", "w-8", "--quantization", "fp8", "--out", str(tmp_path / "8.mp4")])
    exact, rounded = (read_video(path).astype(float) for path in (out, tmp_path / "8.mp4"))
    assert exact.shape == rounded.shape and 0.01 < abs(exact - rounded).mean() < 20


def test_what_is_written_so_far_can_be_watched(given, monkeypatch):
    arguments, out = given
    seen = []
    wrapped = generate.make_video

    def watched(*args, **options):
        frames = next(iter(wrapped(*args, **options)))
        for _ in range(6):
            yield frames[:17]
            partial = list(out.parent.glob(".*.part.mp4"))
            seen.append(len(read_video(partial[0])) if partial[0].stat().st_size > 2000 else 0)

    monkeypatch.setattr(generate, "make_video", watched)
    generate.main([*arguments, "--actions", "w-16"])
    assert seen[-1] >= 48 and seen == sorted(seen)
    assert len(read_video(out)) == 102


def test_the_same_seed_makes_the_same_file(given):
    arguments, out = given
    files = []
    for seed in ("1", "1", "2"):
        generate.main([*arguments, "--actions", "w-8", "--seed", seed])
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]


def test_poses_may_come_from_a_file(given, tmp_path):
    arguments, out = given
    poses = np.tile(np.eye(4, dtype=np.float32), (12, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 12)
    np.save(tmp_path / "path.npy", poses)
    generate.main([*arguments, "--trajectory", str(tmp_path / "path.npy"), "--intrinsics", "80", "80", "48", "32"])
    path = Trajectory.load(out.with_suffix(".npz"))
    assert path.num_frames == 9 and path.intrinsics[0].tolist() == [80, 80, 48, 32]
    assert len(read_video(out)) == 9


def test_a_dry_run_says_what_would_be_made(given, capsys):
    generate.main([*given[0], "--actions", "w-20", "--dry-run"])
    options = json.loads(capsys.readouterr().out)["options"]
    assert options["prompt"] == "a hall <with> columns"
    assert (options["frames"], options["actions"]) == (17, "w-16")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "either --actions or --trajectory"),
        (["--actions", "q-8"], "unknown keys"),
        (["--actions", "w-8", "--seconds", "0"], "more than 0"),
        (["--actions", "w-8", "--seconds", "9000"], "give --seconds"),
        (["--actions", "w-8", "--image", "nowhere.png"], "no image"),
        (["--actions", "w-8", "--out", "a.avi"], "must end in .mp4"),
        (["--actions", "w-8", "--out", "s3://b/a.mp4"], "must be a local folder"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(given, more, message, monkeypatch):
    monkeypatch.setattr(generate.WorldPipeline, "from_pretrained", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        generate.main([*given[0], *more])

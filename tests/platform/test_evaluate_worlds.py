"""Identification of true renderings, and the job that measures a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from longtake.jobs import evaluate_worlds
from longtake.model.camera import parse_actions
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.evaluation import spread
from longtake.platform.evaluate.identification import fans, identify, path_errors, psnr_db
from longtake.platform.observe.job import run_job

pytestmark = pytest.mark.cpu

WAYS = ("a-16", "d-16", "aw-16")


def panned(shift: int, seed: int = 0) -> np.ndarray:
    """17 frames of a smooth picture that moves `shift` pixels a frame."""
    picture = cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 256, (64, 240, 3), dtype=np.uint8), (0, 0), 3)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    return np.stack([picture[:, 70 + shift * i : 166 + shift * i] for i in range(17)])


def test_the_nearest_rendering_is_found_through_blur_noise_and_brightness():
    renderings = [panned(shift) for shift in (-4, -2, 0, 2, 4)]
    grain = np.random.default_rng(1).normal(0, 12, renderings[3].shape)
    seen = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in renderings[3]]) * 0.7 + grain
    seen[:, :8] = 0  # an eighth of the picture is wrong
    nearest, distances = identify(np.clip(seen, 0, 255).astype(np.uint8), renderings)
    assert nearest == 3 and len(distances) == 5


def test_a_still_video_is_taken_for_the_still_rendering():
    renderings = [panned(shift) for shift in (-4, 0, 4)]
    assert identify(np.repeat(renderings[2][:1], 17, axis=0), renderings)[0] == 1


def test_psnr_is_that_of_the_definition():
    grey = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr_db(grey, grey + 5) == pytest.approx(10 * np.log10(255**2 / 25))


def test_errors_of_a_path_are_seen_from_its_first_frame():
    still, moved = (np.tile(np.eye(4, dtype=np.float32), (5, 1, 1)) for _ in range(2))
    turns = np.radians([0.0, 3, 6, 9, 12])
    moved[:, 0, 0] = moved[:, 2, 2] = np.cos(turns)
    moved[:, 0, 2] = np.sin(turns)
    moved[:, 2, 0] = -np.sin(turns)
    moved[:, :3, 3] = np.arange(5)[:, None] * np.array([0.3, 0, 0.4], np.float32)
    assert path_errors(still, moved) == pytest.approx((6, 1), abs=1e-3)
    assert path_errors(moved, moved[3] @ moved) == pytest.approx((0, 0), abs=1e-2)


def test_fans_are_sorted_by_number():
    keys = [f"{start}/{index}" for start in ("b", "a") for index in (10, 2, 0)]
    assert fans(keys) == {"a": ["a/0", "a/2", "a/10"], "b": ["b/0", "b/2", "b/10"]}


@pytest.mark.parametrize("keys", [["hall"], ["hall/x"], ["a/0", "a/1", "b/0"], ["a/0"], []])
def test_keys_that_are_no_fans_are_refused(keys):
    with pytest.raises(ValueError, match="START|same number"):
        fans(keys)


@pytest.fixture(scope="module")
def command(small_weights, tmp_path_factory) -> list[str]:
    """Small weights, and a store of two starts with three renderings each."""
    folder = tmp_path_factory.mktemp("evaluate")
    walks = {text: parse_actions(text, image_size=(64, 96)) for text in WAYS}
    clips = [
        Clip(
            key=f"{start}/{way}",
            frames=panned(way - 1, start),
            c2w=walks[text].c2w.numpy(),
            intrinsics=walks[text].intrinsics.numpy(),
            fps=16,
            caption="a hall",
            metric_scale=1.0,
            licence="CC0-1.0",
            split="test",
        )
        for start in range(2)
        for way, text in enumerate(WAYS)
    ]
    ClipStore(folder / "fan").write_shard("fan", clips)
    return ["--weights", str(small_weights), "--store", str(folder / "fan"), "--out", str(folder / "out")]


def test_the_job_measures_every_figure_and_leaves_sheets(command, monkeypatch):
    written: dict[str, float] = {}
    monkeypatch.setattr(evaluate_worlds.measurements, "write", lambda name, figures: written.update(figures, name=name))
    options = ["--batch-size", "2", "--long", "3", "--long-videos", "1", "--limit", "2", "--device", "cpu"]
    evaluate_worlds.main([*command, *options, "--against", command[1]])
    assert written.pop("name") == "tiny_quality"
    assert set(written) == {
        "vae_psnr_db",
        "identification_3way",
        "identification_3way_no_camera",
        "rotation_error_deg",
        "rotation_error_deg_no_camera",
        "translation_error_m",
        "translation_error_m_no_camera",
        "starts",
        "seconds_for_3s_video",
        "sharpness_drift",
        "color_drift",
        *(
            f"{kind}_drift_{way}{of}"
            for kind in ("sharpness", "color")
            for way in ("walk", "still", "back")
            for of in ("", "_each")
        ),
        "return_psnr_db_still",
        "return_psnr_db_back",
        "identification_3way_against",
        "rotation_error_deg_against",
        "translation_error_m_against",
        "identification_ratio",
    }
    assert written["identification_ratio"] == (1 if written["identification_3way"] else 0)  # of the same weights
    assert written["color_drift"] >= written["color_drift_still"]
    assert 0 <= written["identification_3way"] <= 1
    assert (written["identification_3way"] == 1) == (written["translation_error_m"] == 0)
    out = Path(command[-1])
    names = {
        "vae_00.png",
        "vae_01.png",
        "camera_00.png",
        "camera_01.png",
        "no_camera_00.png",
        "no_camera_01.png",
        "long_walk_00.png",
        "long_still_00.png",
        "long_back_00.png",
        "against",
    }
    assert {path.name for path in out.iterdir()} == names
    assert Image.open(out / "camera_00.png").width == 6 * 96


def test_walks_may_be_those_of_renderings(command, monkeypatch):
    """The fan's own clips, as long as their shortest."""
    written: dict[str, float] = {}
    monkeypatch.setattr(evaluate_worlds.measurements, "write", lambda name, figures: written.update(figures))
    store = command[command.index("--store") + 1]
    frames = min(len(clip.frames) for clip in ClipStore(store).clips())
    few = ["--long-videos", "1", "--limit", "0", "--device", "cpu", "--starts", "1"]
    evaluate_worlds.main([*command, *few, "--long", str((frames - 1) / 16), "--only-with-camera", "--walks", store])
    assert {"sharpness_drift_walk", "sharpness_drift_walk_true", "color_drift_walk_true"} < set(written)
    assert "sharpness_drift_still_true" not in written
    with pytest.raises(ValueError, match="render clips of 961"):
        evaluate_worlds.main([*command, *few, "--walks", store])


def test_clips_and_starts_are_taken_from_all_places():
    assert spread(list("abcdef"), 3) == ["a", "c", "f"]
    assert spread(["a", "b"], 9) == ["a", "b"]
    assert spread(["a", "b"], 0) == []


def test_the_autoencoder_alone_needs_no_fans(command, tmp_path, capsys):
    store = ClipStore(command[3])
    ClipStore(tmp_path / "clips").write_shard("a", [dataclasses.replace(store.read("0/0"), key="one")])
    options = ["--store", str(tmp_path / "clips"), "--starts", "0", "--no-write", "--device", "cpu"]
    evaluate_worlds.main([*command, *options])
    assert "vae_psnr_db" in capsys.readouterr().out


def test_a_dry_run_prints_what_would_be_done(command, capsys):
    evaluate_worlds.main([*command, "--dry-run"])
    assert json.loads(capsys.readouterr().out)["starts"] == 2


@pytest.mark.parametrize(
    ("extra", "says"),
    [(["--store", "nowhere"], "no clips in nowhere"), (["--starts", "0", "--limit", "0"], "nothing to measure")],
)
def test_a_mistake_is_one_line(command, extra, says, capsys):
    with pytest.raises(SystemExit) as end:
        run_job(evaluate_worlds.main, [*command, *extra])
    assert end.value.code == 2
    assert says in capsys.readouterr().err

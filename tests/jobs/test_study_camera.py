"""The job that trains without one or both of the camera's branches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longtake.jobs import study_camera
from longtake.model.camera import parse_actions
from longtake.platform.data.clip import Clip
from longtake.platform.data.store import ClipStore

pytestmark = pytest.mark.cpu


@pytest.fixture
def command(tmp_path) -> list[str]:
    walks = [parse_actions(text, image_size=(64, 96)) for text in ("a-8", "d-8")]
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    arrays = [(walk.c2w.numpy(), walk.intrinsics.numpy()) for walk in walks]
    clips = [Clip(f"hall/{n}", frames, *each, 16, "a hall", 1.0, "CC0-1.0") for n, each in enumerate(arrays)]
    ClipStore(tmp_path / "fans").write_shard("fans", clips)
    chosen = ["--data", str(tmp_path / "latents"), "--store", str(tmp_path / "fans"), "--runs", str(tmp_path / "runs")]
    return [*chosen, "--steps", "7", "--starts", "1"]


def test_every_kind_is_trained_alike_and_measured(command, tmp_path, monkeypatch):
    jobs: dict[str, list[list[str]]] = {"stage1-gdn": [], "evaluate-worlds": []}

    def run(words, environment):
        jobs[words[0]].append(words)
        return '{"identification_2way": 0.5, "rotation_error_deg": 3.0, "translation_error_m": 0.25}\nsheets'

    written: dict[str, float] = {}
    monkeypatch.setattr(study_camera, "_run", run)
    monkeypatch.setattr(study_camera.measurements, "write", lambda name, figures: written.update(figures, name=name))
    study_camera.main(command)
    kinds = ["none", "plucker", "ucpe", "both"]
    assert {f"--set=model.camera_branches={kind}" for kind in kinds} == {words[-2] for words in jobs["stage1-gdn"]}
    assert {words[words.index("--steps") + 1] for words in jobs["stage1-gdn"]} == {"7"}
    measured = {words[words.index("--weights") + 1] for words in jobs["evaluate-worlds"]}
    assert measured == {str(tmp_path / "runs" / kind / "weights") for kind in kinds}
    assert all((tmp_path / "runs" / kind / "weights" / "vae").is_dir() for kind in kinds)
    assert written["name"] == "ablation_tiny" and written["identification_plucker"] == 0.5
    assert {f"{name}_{kind}" for name in study_camera._MEASURES for kind in kinds} < set(written)
    with pytest.raises(ValueError, match="needs weights and metrics of 7 steps: it has 0"):
        study_camera.main([*command, "--trained"])
    for kind in kinds:
        (tmp_path / "runs" / kind / "metrics.jsonl").write_text('{"step": 7}\n')
    jobs["evaluate-worlds"].clear()
    study_camera.main([*command, "--trained"])
    assert len(jobs["stage1-gdn"]) == len(jobs["evaluate-worlds"]) == 4


def test_a_dry_run_prints_commands_that_the_stage_and_the_measure_take(command, capsys):
    from longtake.jobs import evaluate_worlds
    from longtake.platform.train import run

    study_camera.main([*command, "--dry-run"])
    for train, evaluate in json.loads(capsys.readouterr().out).values():
        settings = run.resolve("stage1_gdn", run.stage_parser("stage1_gdn", None).parse_args(train[1:]))
        assert settings.config.softmax_every == 4 and settings.stage.steps == 7
        assert not evaluate_worlds.arguments(evaluate[1:]).without_camera


def test_what_a_job_says_when_it_fails_is_passed_on(command):
    with pytest.raises(ValueError, match="latents has no train clips"):
        study_camera.main(command)

"""The job that times a stage's steps."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench_train
from longtake.platform.observe import measurements

pytestmark = pytest.mark.cpu


def test_workers_that_share_a_clip_are_timed_and_send_what_they_should(tmp_path, monkeypatch, ray_cluster):
    write = measurements.write
    monkeypatch.setattr(bench_train.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    bench_train.main(["--layouts", "2x2x3", "--steps", "3", "--name", "here", "--set", "optimizer=adamw"])
    figures = json.loads((tmp_path / "here.json").read_text())["figures"]
    assert figures["step_s_T3_cp2"] > 0 and figures["tokens_per_s_T3_cp2"] > 0
    assert figures["bytes_per_layer_softmax_T3_cp2"] > figures["bytes_per_layer_gdn_T3_cp2"] > 0


def test_a_generator_and_its_critic_are_timed(tmp_path, monkeypatch, ray_cluster):
    write = measurements.write
    monkeypatch.setattr(bench_train.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    command = ["--stage", "stage4_distill", "--layouts", "1x1x4", "--steps", "3", "--name", "here"]
    changes = "options.generator_every=1", "options.guidance=1.0", "model.depth=4"
    bench_train.main([*command, *(word for change in changes for word in ("--set", change))])
    assert json.loads((tmp_path / "here.json").read_text())["figures"]["step_s_T4_cp1"] > 0


def test_a_layout_is_workers_sharing_and_frames(capsys):
    bench_train.main(["--preset", "sana-wm", "--layouts", "4x2x121", "1x1x61", "--dry-run"])
    minute, alone = json.loads(capsys.readouterr().out)
    assert (minute["frames"], minute["batch_size"], minute["context_parallel"], minute["zero_stage"]) == (961, 2, 2, 3)
    assert (alone["frames"], alone["batch_size"], alone["context_parallel"], alone["zero_stage"]) == (481, 1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "2x121"], "write WORKERSxSHARINGxFRAMES"),
        (["--layouts", "3x2x9"], "must be a multiple"),
        (["--layouts", "4x4x3"], "need a frame each"),
        (["--steps", "2"], "more than 2"),
        (["--stage", "stage0_vae"], "needs more than random latents"),
        (["--stage", "stage3"], "no stage"),
        (["--name", "A b"], "lower-case"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_train.main([*arguments, "--dry-run"])

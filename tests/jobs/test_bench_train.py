"""The job that times a stage's steps."""

from __future__ import annotations

import json

import pytest

from longtake.jobs import bench_train
from longtake.platform.observe import measurements

pytestmark = [pytest.mark.cpu, pytest.mark.ray]


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


def test_a_refiner_s_adapters_are_timed(tmp_path, monkeypatch, ray_cluster):
    write = measurements.write
    monkeypatch.setattr(bench_train.measurements, "write", lambda *args: write(*args, folder=tmp_path))
    command = ["--stage", "stage5_refiner", "--layouts", "1x1x3", "--steps", "3", "--name", "here"]
    changes = ["options.pairs=True", "model.refiner.lora_rank=4", "model.refiner.text_dim=40", "optimizer=adamw"]
    changes += ["zero_stage=3", "offload=True", "checkpoint_blocks=True", "ema=0.0"]
    bench_train.main([*command, *(word for change in changes for word in ("--set", change))])
    assert json.loads((tmp_path / "here.json").read_text())["figures"]["step_s_T3_cp1"] > 0


def test_the_full_refiner_is_timed_on_one_gpu_and_on_several(capsys):
    command = ["--preset", "sana-wm", "--stage", "stage5_refiner", "--layouts", "1x1x11", "2x1x11", "--dry-run"]
    bench_train.main([*command, "--set", "offload=True"])
    alone, two = json.loads(capsys.readouterr().out)
    assert alone["options"] == {"pairs": True, "base_dtype": "bfloat16"} and alone["checkpoint_blocks"]
    assert (alone["batch_size"], alone["zero_stage"], two["batch_size"], two["zero_stage"]) == (1, 3, 2, 3)


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

"""Distillation as jobs: a teacher's trajectories, the lesson on them, and two networks that train each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.jobs import make_trajectories, stage4_distill
from longtake.model import presets, weights
from longtake.model.camera import CameraFeatures, Trajectory
from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.model.samplers.flow_euler import euler, schedule
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.train import feed, log, stages
from longtake.platform.train.settings import Settings

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

FRAMES = 17
FEW = SamplerConfig(2, 3.0, 1.0, timesteps=(1000, 750, 0), chunk_interval=1)
_FILE = "transformer/model.safetensors"


def causal(config: WorldModelConfig) -> WorldModelConfig:
    return dataclasses.replace(config, chunk_causal=True, chunk_window=1, chunk_size=1, sampler=FEW)


def write_trajectories(store: LatentStore, config: WorldModelConfig, clips: int = 4, timesteps=(1000, 750)) -> None:
    write_random(store, config, FRAMES, clips)
    rng = np.random.default_rng(1)
    for name in store.shards():
        (clip,) = store.read_shard(name)
        noisy = rng.normal(size=(len(timesteps), *clip.latents.shape)).astype(np.float16)
        store.write_shard(name, [dataclasses.replace(clip, noisy=noisy, timesteps=timesteps)])


def run_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "transformer" / "model.safetensors")


@pytest.fixture(scope="module")
def teacher(small_config: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    pipeline = WorldPipeline.from_config(small_config, parts=("text", "dit"))
    for parameter in pipeline.modules["dit"].parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    pipeline.save_pretrained(folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def runs(
    ray_cluster: str,
    fit_all: Callable,
    small_config: WorldModelConfig,
    teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    """Folder of finished runs, each named after what was special about it."""
    folder = tmp_path_factory.mktemp("runs")
    config = causal(small_config)
    store = LatentStore(str(folder / "trajectories"))
    write_trajectories(store, config)

    def settings(name: str, workers: int = 1, stage: str = "stage4_distill", **changes: Any) -> Settings:
        values = dict(frames=FRAMES, window=9, batch_size=4, steps=6, log_every=1, ema=0.0, optimizer="adamw")
        values |= dict(learning_rate=1e-3, schedule="constant", warmup=0, cache=None) | changes
        options = {"stage4_distill": dict(teacher=str(teacher), guidance=1.0, generator_every=2, replay=True)}.get(
            stage, {}
        )
        chosen = dataclasses.replace(stages.get(stage, "tiny"), options=options, **values)
        init = {part: str(teacher) for part in ("dit", "text")}
        return Settings(chosen, config, ((store.uri, 1.0),), str(folder / name), init, workers)

    resumed = [settings("resumed", steps=3, ema=0.5), settings("resumed", ema=0.5)]
    fit_all(
        folder / "ray",
        [settings("ode", stage="stage4_ode"), settings("whole"), settings("averaged", ema=0.5), *resumed],
        1,
    )
    fit_all(
        folder / "ray",
        [settings("two", 2), settings("zero2", 2, zero_stage=2), settings("parts", 2, micro_batch_size=1)],
        2,
    )
    return folder


def test_both_networks_learn_and_the_records_tell(runs: Path):
    records = log.read(runs / "whole")
    assert len(records) == 6
    for name in ("loss", "generator_loss", "grad_norm", "grad_norm_generator"):
        assert all(np.isfinite(record[name]) for record in records)
    assert len({record["loss"] for record in records}) == 6  # the critic's
    assert len({record["generator_loss"] for record in records}) == 3  # of steps 0, 2 and 4
    (first, *_, last) = log.read(runs / "ode")
    assert last["loss"] < first["loss"]


def test_what_is_written_is_the_generator_as_a_few_step_model(runs: Path, teacher: Path, small_config):
    assert weights.config_for(small_config, runs / "whole" / "weights") == causal(small_config)
    made, theirs = run_weights(runs / "whole"), load_file(teacher / _FILE)
    assert made.keys() == theirs.keys()
    name = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(made[name].float(), theirs[name], atol=1e-3)
    text = [load_file(at / "text_encoder" / "model.safetensors") for at in (runs / "whole" / "weights", teacher)]
    assert all(torch.allclose(text[0][key].float(), text[1][key], atol=1e-3) for key in text[1])


@pytest.mark.parametrize(
    ("run", "other"), [("two", "whole"), ("zero2", "whole"), ("parts", "whole"), ("resumed", "averaged")]
)
def test_workers_and_interruptions_change_nothing(runs: Path, teacher: Path, run: str, other: str):
    """But the order of sums, of which Adam's first steps make much where gradients are nearly zero."""
    ours, theirs, begin = run_weights(runs / run), run_weights(runs / other), load_file(teacher / _FILE)
    assert _distance(ours, theirs) < 0.1 * _distance(theirs, begin)
    ours, theirs = ([record["loss"] for record in log.read(runs / name)] for name in (run, other))
    assert ours == pytest.approx(theirs, rel=1e-3)


def _distance(weights: dict, others: dict) -> float:
    return float(sum((weights[name].float() - others[name].float()).square().sum() for name in others)) ** 0.5


@pytest.fixture
def starts(small_weights: Path, tmp_path: Path) -> tuple[str, WorldModelConfig]:
    config = WorldPipeline.from_pretrained("tiny", small_weights, parts=()).config
    write_random(LatentStore(str(tmp_path / "latents")), config, FRAMES, 3)
    return str(tmp_path / "latents"), config


def test_a_teacher_s_trajectory_ends_in_its_rollout(starts, small_weights, tmp_path, ray_cluster):
    data, config = starts
    to = str(tmp_path / "made")
    command = ["--data", data, "--trajectories", to, "--weights", str(small_weights), "--timesteps", "1000"]
    make_trajectories.main([*command, "--num-steps", "3", "--batch", "2"])
    made, given = list(LatentStore(to).clips()), list(LatentStore(data).clips())
    assert [clip.key for clip in made] == [clip.key for clip in given]
    pipeline = WorldPipeline.from_pretrained("tiny", small_weights, parts=("dit", "text"))
    for clip, start in zip(made, given, strict=True):
        assert clip.noisy is not None and clip.noisy.shape == (1, *start.latents.shape) and clip.timesteps == (1000,)
        for latents in (clip.latents, clip.noisy[0]):
            assert np.array_equal(latents[:, 0], start.latents[:, 0])
        assert abs(clip.noisy[0, :, 1:].astype(np.float32).std() - 1) < 0.1
        path = Trajectory(torch.tensor(clip.c2w), torch.tensor(clip.intrinsics))
        camera = CameraFeatures.cat([path.features(config.image_size, config.vae_stride)])
        noise = torch.tensor(clip.noisy[0]).float()[None]
        image = torch.tensor(start.latents[None, :, :1]).float()
        text = pipeline.encode_text([clip.caption])
        x, velocity = pipeline._denoising(image, *text, camera, [0], 3, None)
        expected = euler(velocity, noise, schedule(3, config.sampler.shift), 1)
        np.testing.assert_allclose(clip.latents, expected[0].numpy(), atol=0.02)
    stamp = [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").glob("*.parquet"))]
    make_trajectories.main([*command, "--num-steps", "3"])  # nothing is left to do
    assert stamp == [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").glob("*.parquet"))]
    with pytest.raises(ValueError, match="choose another"):
        make_trajectories.main([*command, "--num-steps", "4"])
    # The same weights may lie elsewhere, but not have changed.
    moved = shutil.copytree(small_weights, tmp_path / "moved")
    command[command.index(str(small_weights))] = str(moved)
    make_trajectories.main([*command, "--num-steps", "3"])
    save_file({name: 2 * tensor for name, tensor in load_file(moved / _FILE).items()}, moved / _FILE)
    with pytest.raises(ValueError, match="choose another"):
        make_trajectories.main([*command, "--num-steps", "3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timesteps", "900", "500"], "must fall from 1000"),
        (["--timesteps", "1000", "0"], "stay above 0"),
        (["--batch", "0"], "at least 1"),
        (["--weights", "nowhere"], "nowhere"),
        (["--preset", "sana-wm"], "no weights are shipped"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trajectories.main(["--data", str(tmp_path), "--trajectories", str(tmp_path / "to"), *arguments])


def test_the_lesson_needs_trajectories_of_its_own_sampler(small_config, tmp_path):
    config = causal(small_config)
    stage = dataclasses.replace(stages.get("stage4_ode", "tiny"), frames=FRAMES, window=9)
    plain, other, more, right = (LatentStore(str(tmp_path / str(n))) for n in range(4))
    write_random(plain, config, FRAMES, 1)
    with pytest.raises(ValueError, match="is no trajectory of a teacher"):
        feed.open_source(stage, config, plain.uri)
    for store, timesteps in ((other, (1000, 600)), (more, (1000, 750, 500))):
        write_trajectories(store, config, 1, timesteps)
        with pytest.raises(ValueError, match="the sampler's are \\(1000, 750\\): make them again"):
            feed.open_source(stage, config, store.uri)
    write_trajectories(right, config, 1)
    assert feed.open_source(stage, config, right.uri).batch(0, 1)["noisy"].shape == (1, 2, 16, 3, 2, 3)


def test_the_whole_recipe_from_start_images_alone(small_weights, tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setitem(presets._PRESETS, "tiny", weights.config_for(presets.get("tiny"), small_weights))
    run = tmp_path / "run"
    command = ["--teacher", str(small_weights), "--run", str(run), "--starts", "2", "--ode-steps", "2", "--steps", "2"]
    command += ["--set", "frames=49", "--set", "batch_size=2", "--set", "log_every=1"]
    stage4_distill.main(command)
    assert len(log.read(run)) == 2 and len(log.read(run / "ode")) == 2
    clips = list(LatentStore(str(run / "trajectories")).clips())
    assert {clip.key for clip in clips} == {"hall-00000", "yard-00001"} and clips[0].caption == "a hall <with> columns"
    assert clips[0].licence == "CC0-1.0" and clips[0].latents.shape[1] == 7
    pipeline = WorldPipeline.from_pretrained("tiny", run / "weights")
    path = Trajectory(torch.tensor(clips[0].c2w), torch.tensor(clips[0].intrinsics))
    picture = pipeline.prepare_image(small_weights / "images" / "hall.png")
    assert pipeline.generate([picture], ["a hall"], [path], [0]).shape[2] == 7
    with pytest.raises(ValueError, match="distilled to 4 steps"):
        pipeline.generate([picture], ["a hall"], [path], [0], num_steps=8)
    with pytest.raises(ValueError, match="sees no later chunk: a teacher"):
        stage4_distill.main(["--teacher", str(run), "--run", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "weights/tiny"], "from which clips"),
        (["--data", "a", "--data", "b"], "is one store"),
        (["--starts", "0"], "at least 1"),
        (["--set", "zero_stage=3"], "several networks"),
        (["--set", "step=3"], "did you mean 'steps'"),
    ],
)
def test_mistakes_in_the_recipe_are_named(arguments, message, small_weights):
    with pytest.raises(ValueError, match=message):
        stage4_distill.main(["--teacher", str(small_weights), *arguments])


def test_a_dry_run_shows_both_stages(small_weights, capsys, tmp_path):
    stage4_distill.main(["--teacher", str(small_weights), "--dry-run", "--run", str(tmp_path / "run")])
    shown = json.loads(capsys.readouterr().out)
    assert shown["first"]["stage"]["name"] == "stage4_ode" and shown["then"]["name"] == "stage4_distill"
    assert shown["first"]["max_minutes"] == pytest.approx(0.4 * 12) and not (tmp_path / "run").exists()

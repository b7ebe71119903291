"""The refiner's adapters trained from pairs: alone, under ZeRO, cut short, and as weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtake.jobs import stage5_refiner
from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.objectives.refiner import RefinerObjective
from longtake.model.pipeline import WorldPipeline
from longtake.model.refiner import Refiner
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.observe.job import user_message
from longtake.platform.train import checkpoint, log, loop, run, stages
from longtake.platform.train.settings import Settings

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

FRAMES = 17


@pytest.fixture(scope="module")
def adapted(small_config: WorldModelConfig) -> WorldModelConfig:
    refiner = dataclasses.replace(small_config.refiner, lora_rank=4, num_layers=2, text_dim=40, sigmas=(0.5, 0.0))
    return dataclasses.replace(small_config, name="tiny", refiner=refiner)


@pytest.fixture(scope="module")
def base(adapted: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    weights.save_part(Refiner(adapted), folder, "refiner", torch.float32)
    weights.save_config(adapted, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(adapted: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = LatentStore(str(tmp_path_factory.mktemp("pairs")))
    write_random(store, adapted, FRAMES, 4, versions=2)
    return store.uri


@pytest.fixture(scope="module")
def runs(
    ray_cluster: str, fit_all: Callable, adapted: WorldModelConfig, base: Path, pairs: str, tmp_path_factory
) -> Path:
    """Folder of finished runs, each named after what was special about it."""
    folder = tmp_path_factory.mktemp("runs")

    def settings(name: str, workers: int = 1, **changes: Any) -> Settings:
        values = dict(frames=FRAMES, window=9, batch_size=2, micro_batch_size=1, steps=4, log_every=1, ema=0.0)
        values |= dict(optimizer="adamw", learning_rate=1e-2, schedule="constant", warmup=0, cache=None)
        values |= dict(options=dict(pairs=True), weight_decay=0.0) | changes
        stage = dataclasses.replace(stages.get("stage5_refiner", "tiny"), **values)
        init = {"refiner": str(base)}
        return Settings(stage, adapted, ((pairs, 1.0),), str(folder / name), init, workers)

    lean: dict[str, Any] = dict(zero_stage=3, offload=True, checkpoint_blocks=True)
    averaged = [settings("averaged", ema=0.9), settings("averaged halved", steps=2, ema=0.9)]
    averaged += [settings("averaged halved", ema=0.9), settings("grown", steps=2, zero_stage=2)]
    mixed = settings("16 bits", options=dict(pairs=True, base_dtype="bfloat16"))
    fit_all(folder / "ray", [settings("one"), settings("again", checkpoint_blocks=True), *averaged, mixed], 1)
    two = [settings("zero 2", 2, zero_stage=2), settings("zero 3", 2, zero_stage=3)]
    two += [settings("zero 3, halved", 2, steps=2, **lean), settings("zero 3, halved", 2, **lean)]
    two += [settings("zero 3, 16 bits", 2, options=mixed.stage.options, **lean), settings("grown", 2, zero_stage=2)]
    fit_all(folder / "ray", two, 2)
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in log.read(folder)}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / weights.ADAPTERS / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["again", "zero 2", "zero 3", "zero 3, halved", "grown"])
def test_adapters_train_alike_whatever_saves_memory_or_interrupts(name: str, runs: Path):
    assert list(losses(runs / name)) == [1, 2, 3, 4]
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-4)
    ours, theirs = trained(runs / name), trained(runs / "one")
    assert ours.keys() == theirs.keys()
    # But the order of sums, of which Adam's first steps make much where gradients are nearly zero.
    far = sum((ours[key].float() - theirs[key].float()).square().sum() for key in theirs)
    assert far < 1e-2 * sum(x.float().square().sum() for key, x in theirs.items() if "lora_B" in key)


def test_the_average_of_a_run_stopped_at_step_2_is_that_of_one_that_never_stopped(runs: Path):
    ours, theirs = trained(runs / "averaged halved"), trained(runs / "averaged")
    assert losses(runs / "averaged halved") == losses(runs / "averaged")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_base_of_16_bits_trains_about_as_one_of_32(runs: Path):
    assert losses(runs / "16 bits") == pytest.approx(losses(runs / "one"), rel=0.02)
    assert losses(runs / "zero 3, 16 bits") == pytest.approx(losses(runs / "16 bits"), rel=1e-3)


@pytest.mark.parametrize("name", ["one", "zero 3", "averaged"])
def test_the_base_stays_as_it_was_and_the_adapters_do_not(name: str, runs: Path, base: Path):
    made = runs / name / "weights"
    assert weights.digest(made / "refiner") == weights.digest(base / "refiner")
    about = json.loads((made / weights.ADAPTERS / "adapter_config.json").read_text())
    assert about["r"] == 4
    assert all(tensor.any() for tensor in trained(runs / name).values())


@pytest.mark.parametrize("name", ["one", "zero 3"])
def test_checkpoints_hold_adapters_without_their_base(name: str, runs: Path, base: Path):
    newest = checkpoint.newest(runs / name / "checkpoints")
    assert newest
    states = [torch.load(file, weights_only=False) for file in newest.rglob("*model_states.pt")]
    assert states and all(".lora_" in key for state in states for key in state["module"])
    assert not any(state.get("frozen_param_fragments") for state in states)


def test_a_run_s_weights_are_a_pipeline_s(runs: Path, adapted: WorldModelConfig, base: Path):
    ours, plain = (
        WorldPipeline.from_pretrained("tiny", at, parts=["refiner"]) for at in (runs / "one" / "weights", base)
    )
    latents, text = torch.randn(1, 16, 3, 2, 3), torch.randn(1, 5, 40)
    made = [pipeline.refine(latents, text, torch.ones(1, 5), seeds=[0]) for pipeline in (ours, plain)]
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert run.find_parts([str(runs / "one")]) == {"refiner": str((runs / "one" / "weights").resolve())}


def test_a_run_does_not_go_on_with_another_base(runs: Path, adapted, base: Path, pairs: str, tmp_path: Path):
    torch.manual_seed(9)
    weights.save_part(Refiner(adapted), tmp_path / "other", "refiner", torch.float32)
    shutil.copytree(runs / "one", tmp_path / "run")
    record = json.loads((runs / "one" / "weights" / "config.json").read_text())
    assert record["refiner"]["lora_rank"] == 4
    values = dict(frames=FRAMES, window=9, batch_size=2, micro_batch_size=1, steps=6, ema=0.0, optimizer="adamw")
    stage = dataclasses.replace(stages.get("stage5_refiner", "tiny"), options=dict(pairs=True), cache=None, **values)
    init = {"refiner": str(tmp_path / "other")}
    with pytest.raises(Exception) as error:
        run.launch(Settings(stage, adapted, ((pairs, 1.0),), str(tmp_path / "run"), init))
    assert "this run began from frozen weights" in (user_message(error.value) or "")


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        ("sana-wm", [], "trains adapters of a refiner that exists: give the folder that holds its refiner/"),
        ("tiny", ["--set", "options.pairs=True"], "reads captions through stage 1's text encoder"),
        ("tiny", ["--set", "model.refiner.rank=3"], r"model\.refiner\.rank is no field"),
        ("tiny", ["--set", "model.refiner.lora_rank=-1"], "lora_rank -1 must be at least 0"),
    ],
)
def test_what_the_stage_lacks_is_said_before_it_starts(preset: str, arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        stage5_refiner.main(["--preset", preset, "--data", "latents", "--workers", "1", *arguments])


def test_of_pairs_the_refiner_alone_is_compiled(adapted: WorldModelConfig):
    """The table's stage compiles stage 1 too, which there is none of then."""
    stage = stages.get("stage5_refiner", "tiny")
    objective = RefinerObjective(adapted, pairs=True)
    loop._speed_up(objective, stage)
    blocks = objective.refiner.get_submodule("transformer.transformer_blocks")
    assert all(block._compiled_call_impl for block in blocks)  # type: ignore[attr-defined]


def test_the_full_size_needs_its_base_alone(tmp_path: Path, capsys):
    (tmp_path / "refiner").mkdir()
    command = ["--preset", "sana-wm", "--data", "pairs", "--init", str(tmp_path), "--dry-run"]
    stage5_refiner.main([*command, "--workers", "2", "--set", "model.refiner.block_size=3"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["init"] == {"refiner": str(tmp_path)} and shown["config"]["refiner"]["block_size"] == 3
    assert shown["config"]["refiner"]["lora_rank"] == 384 and shown["stage"]["checkpoint_blocks"]
    with pytest.raises(ValueError, match="starts from the weights of stage2_hybrid"):
        stage5_refiner.main([*command, "--set", "options.pairs=False"])

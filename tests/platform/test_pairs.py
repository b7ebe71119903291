"""Pairs for the refiner, made as a job and read by its stage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.jobs import make_pairs
from longtake.model import presets, weights
from longtake.model.objectives import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.samplers.degrade import degraded
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.distill.pairs import Coarse, PairMaker
from longtake.platform.train import feed, stages

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

FRAMES = 17


@pytest.fixture
def store(small_weights: Path, tmp_path: Path) -> str:
    config = weights.config_for(presets.get("tiny"), small_weights)
    write_random(LatentStore(str(tmp_path / "latents")), config, FRAMES, 3)
    return str(tmp_path / "latents")


@pytest.fixture
def coarse(small_weights: Path) -> Coarse:
    config = weights.config_for(presets.get("tiny"), small_weights)
    return Coarse(config, str(small_weights), (0.5, 0.9), num_steps=2, batch=2)


def made_by(coarse: Coarse, store: str, to: Path, **changes) -> list[np.ndarray]:
    """The versions (K, C, T, h, w) of each clip."""
    maker = PairMaker(dataclasses.replace(coarse, **changes), store, str(to))
    maker({"shard": np.array(LatentStore(store).shards())})
    return [np.asarray(clip.noisy, np.float32) for clip in LatentStore(str(to)).clips()]


def test_a_clip_s_versions_are_stage_1_s_from_each_sigma(store, small_weights, tmp_path, ray_cluster):
    to, given = str(tmp_path / "pairs"), list(LatentStore(store).clips())
    command = ["--data", store, "--pairs", to, "--weights", str(small_weights), "--sigmas", "0.5", "0.9"]
    make_pairs.main([*command, "--num-steps", "2"])
    made = list(LatentStore(to).clips())
    assert [clip.key for clip in made] == [clip.key for clip in given]
    stage1 = FlowObjective(weights.config_for(presets.get("tiny"), small_weights))
    stage1.load(small_weights)
    for clip, true in zip(made, given, strict=True):
        assert clip.noisy is not None and clip.noisy.shape == (2, *true.latents.shape) and clip.timesteps == (500, 900)
        assert np.array_equal(clip.latents, true.latents) and clip.caption == true.caption
        assert all(np.array_equal(version[:, 0], true.latents[:, 0]) for version in clip.noisy)
        lost = [np.square(version - true.latents.astype(np.float32)).mean() for version in clip.noisy]
        assert 0 < lost[0] < lost[1]
    stamp = [path.stat().st_mtime_ns for path in sorted(Path(to).glob("*.parquet"))]
    make_pairs.main([*command, "--num-steps", "2"])  # nothing is left to do
    assert stamp == [path.stat().st_mtime_ns for path in sorted(Path(to).glob("*.parquet"))]
    with pytest.raises(ValueError, match="choose another"):
        make_pairs.main([*command, "--num-steps", "3"])
    changed = small_weights / "transformer" / "model.safetensors"
    before = changed.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(changed).items()}, changed)
    with pytest.raises(ValueError, match="choose another"):
        make_pairs.main([*command, "--num-steps", "2"])
    changed.write_bytes(before)


def test_a_clip_s_versions_do_not_depend_on_its_neighbours(coarse, store, tmp_path):
    together, alone = made_by(coarse, store, tmp_path / "a"), made_by(coarse, store, tmp_path / "b", batch=1)
    assert all(np.allclose(*pair, atol=2e-3) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_of_versions_needs_no_stage_1(share, coarse, store, tmp_path):
    true, mixed = made_by(coarse, store, tmp_path / "a"), made_by(coarse, store, tmp_path / "b", synthetic=share)
    same = [np.array_equal(*pair) for one, two in zip(true, mixed, strict=True) for pair in zip(one, two, strict=True)]
    assert not any(same) if share == 1 else 0 < sum(same) < len(same)
    if share == 1:
        nowhere = made_by(coarse, store, tmp_path / "c", synthetic=share, folder="")
        assert all(np.array_equal(*pair) for pair in zip(nowhere, mixed, strict=True))


def test_what_is_synthetic_keeps_the_image_and_loses_more_detail_with_sigma():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, 7)
    made = [degraded(x, torch.zeros_like(x), sigma) for sigma in (0.3, 0.6, 0.9)]
    assert all(torch.equal(each[:, :, 0], x[:, :, 0]) for each in made)
    kept = [each[:, :, 1:].std().item() for each in made]
    assert x[:, :, 1:].std() > kept[0] > kept[1] > kept[2] > 0.1
    flat = torch.ones(1, 2, 3, 4, 5)
    torch.testing.assert_close(degraded(flat, torch.zeros_like(flat), 0.9), flat)
    noise = Draws(0, [0]).normal(2, 3, 4, 5)
    assert degraded(flat, noise, 0.9)[:, :, 1:].std() > 0.01


def test_chunk_causal_weights_make_pairs_too(coarse, store, tmp_path):
    causal = dataclasses.replace(coarse.config, chunk_causal=True, chunk_size=1)
    chunks = made_by(coarse, store, tmp_path / "a", config=causal)
    assert chunks[0].shape == made_by(coarse, store, tmp_path / "b")[0].shape and np.isfinite(chunks[0]).all()


def test_the_refiner_s_stage_reads_pairs(coarse, store, tmp_path):
    stage = dataclasses.replace(stages.get("stage5_refiner", "tiny"), frames=FRAMES, window=9)
    stage = dataclasses.replace(stage, options=dict(pairs=True))
    with pytest.raises(ValueError, match="has no pairs"):
        feed.open_source(stage, coarse.config, store)
    versions = made_by(coarse, store, tmp_path / "a")
    batch = feed.open_source(stage, coarse.config, str(tmp_path / "a")).batch(0, 3)
    assert batch["noisy"].shape == (3, *versions[0].shape)
    own = dataclasses.replace(coarse.config, refiner=dataclasses.replace(coarse.config.refiner, text_dim=40))
    with pytest.raises(ValueError, match="has no features for the refiner"):
        feed.open_source(stage, own, str(tmp_path / "a"))
    rng = np.random.default_rng(0)
    for name, count in (("0000", 3), ("0001", 5), ("0002", 4)):
        (clip,) = LatentStore(store).read_shard(name)
        text = rng.normal(size=(count, 40)).astype(np.float16)
        full = dataclasses.replace(clip, noisy=np.stack([clip.latents] * 2), timesteps=(500, 900), refiner_text=text)
        LatentStore(str(tmp_path / "full")).write_shard(name, [full])
    batch = feed.open_source(stage, own, str(tmp_path / "full")).batch(0, 3)
    assert batch["refiner_text"].shape == (3, 5, 40) and batch["refiner_text_mask"].sum() == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigmas", "0.5", "1"], "between 0 and 1"),
        (["--synthetic", "1.5"], "from 0 to 1"),
        (["--batch", "0"], "at least 1"),
        (["--weights", "nowhere"], "nowhere"),
        (["--preset", "sana-wm"], "no weights are shipped"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_pairs.main(["--data", str(tmp_path), "--pairs", str(tmp_path / "to"), *arguments])


def test_a_dry_run_prints_the_arguments(capsys):
    make_pairs.main(["--preset", "sana-wm", "--data", "a", "--pairs", "b", "--synthetic", "1", "--dry-run"])
    assert json.loads(capsys.readouterr().out)["weights"] == ""

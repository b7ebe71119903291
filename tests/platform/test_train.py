"""Training through Ray Train and DeepSpeed, on a model of a few thousand parameters."""

import dataclasses
import json
import os
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from longtake.model import sana_video
from longtake.model.config import RefinerConfig, SamplerConfig, TextConfig, WorldModelConfig
from longtake.model.weights import FOLDERS
from longtake.platform.data.clip import Clip
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.store import ClipStore
from longtake.platform.observe.job import user_message
from longtake.platform.store.video import read_video
from longtake.platform.train import checkpoint, feed, log, run, schedule, stages
from longtake.platform.train.loop import train
from longtake.platform.train.order import Order, Share
from longtake.platform.train.settings import Settings

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

MICRO = WorldModelConfig(
    name="micro",
    depth=4,
    hidden_size=32,
    num_heads=1,
    head_dim=32,
    latent_channels=8,
    text_dim=16,
    mlp_ratio=1.0,
    image_size=(32, 64),
    sampler=SamplerConfig(num_steps=1, shift=3.0, guidance_scale=1.0),
    text=TextConfig(kind="bytes", length=8, dim=16, depth=1),
    refiner=RefinerConfig(num_layers=1, num_heads=1, head_dim=24, text_dim=16, lora_rank=0, sigmas=(0.5, 0.0)),
    vae=dict(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=(0, 0, 0, 0, 1),
        decoder_block_out_channels=(8, 8, 16),
        decoder_layers_per_block=(1, 0, 0, 0),
        upsample_factor=(1, 1, 2),
        decoder_spatial_padding_mode="zeros",
    ),
)
CAUSAL = dataclasses.replace(MICRO, chunk_causal=True, chunk_size=1)
FRAMES = 17
POSES, PINHOLES = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1)), np.full((FRAMES, 4), 32, np.float32)


def make_clips(folder):
    """A store of five clips of `FRAMES` frames."""
    rng = np.random.default_rng(0)
    store = ClipStore(folder)
    videos = [rng.integers(0, 255, (FRAMES, 32, 64, 3), np.uint8) for _ in range(5)]
    store.write_shard("a", [Clip(f"clip{i}", x, POSES, PINHOLES, 16, "a", 1, "CC0-1.0") for i, x in enumerate(videos)])
    return store.uri


def make_latents(folder, clips=5, seed=0, poisoned=()):
    """A store of latents, NaN in those of the poisoned clips."""
    rng = np.random.default_rng(seed)
    store = LatentStore(str(folder))
    arrays = [rng.normal(size=(8, 3, 1, 2)).astype(np.float16) for _ in range(clips)]
    for n in poisoned:
        arrays[n][0, 1, 0, 0] = np.nan
    store.write_shard("a", [EncodedClip(f"clip{i}", x, POSES, PINHOLES, "a") for i, x in enumerate(arrays)])
    return store.uri


def settings(data, folder, name="stage0_vae", init=None, max_minutes=None, workers=1, **changes):
    values = dict(
        frames=FRAMES,
        window=9,
        batch_size=2,
        steps=4,
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="constant",
        warmup=0,
        ema=0.9,
        log_every=1,
        compile="",
    )
    stage = dataclasses.replace(stages.get(name, "tiny"), **(values | changes))
    corpora = ((data, 1.0),) if isinstance(data, str) else data
    return Settings(stage, MICRO, corpora, str(folder), init or {}, workers, max_minutes)


def forty_steps(latents, folder):
    return settings(latents, folder, "stage1_gdn", steps=40, checkpoint_steps=10, workers=2)


def losses(folder):
    return {record["step"]: record["loss"] for record in log.read(folder)}


def weights(folder):
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted((folder / "weights").glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def alike(folder, other):
    """Whether two runs have the same weights; the moments are of what a first worker saw."""
    ours, theirs = weights(folder), weights(other)
    return all(torch.allclose(ours[k].float(), theirs[k].float(), atol=2e-3) for k in ours if "latents_" not in k)


def fit(scratch, all_settings, workers=1, notice=None):
    """Train one run after the other in one Ray Train job: starting one takes ten times as long as these runs.

    notice: a file that appears on the last worker's machine once the last run has made a step.
    """

    def announce(folder, notice):
        while not log.read(folder):
            time.sleep(0.01)
        notice.touch()

    def train_all(config):
        for each in config["runs"]:
            last = each is config["runs"][-1] and ray.train.get_context().get_world_rank() == workers - 1
            if notice and last:
                os.environ[schedule.NOTICE] = str(notice)
                threading.Thread(target=announce, args=[each.folder, notice]).start()
            train(each)

    for each in all_settings:
        each.folder.mkdir(parents=True, exist_ok=True)
    TorchTrainer(
        train_all,
        train_loop_config={"runs": all_settings},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(scratch)),
    ).fit()


@pytest.fixture(scope="module")
def runs(ray_cluster, sana_video_of, tmp_path_factory):
    """Folder of finished runs, each named after what was special about it."""
    folder = tmp_path_factory.mktemp("runs")
    sana_video_of(MICRO, in_channels=4, out_channels=4, patch_size=(1, 2, 2)).save_pretrained(folder / "video")
    clips, latents = make_clips(folder / "clips"), make_latents(folder / "latents")
    more, poisoned = make_latents(folder / "more", seed=1), make_latents(folder / "poisoned", poisoned=[0])

    def flow(name, **changes):
        return settings(latents, folder / name, "stage1_gdn", micro_batch_size=1, **changes)

    gdn = {part: str(folder / "gdn" / "weights") for part in ("dit", "text")}
    init = {part: str(folder / run / "weights") for part, run in (("vae", "vae"), ("dit", "flow"), ("text", "flow"))}
    by_zero_stage = [dict(zero_stage=n, ema=0.0 if n == 3 else 0.9) for n in (0, 2, 3)]
    one = [
        settings(clips, folder / "vae"),
        settings(clips, folder / "vae halved", steps=2),
        settings(clips, folder / "vae halved"),
        settings(clips, folder / "vae timed", steps=100_000, max_minutes=0.03, schedule="cosine"),
        flow("flow"),
        flow("flow halved", steps=2),
        flow("flow halved", cache=None),
        flow("flow grown", steps=2),
        *(flow(f"flow grown, zero {values['zero_stage']}", steps=2, **values) for values in by_zero_stage[1:]),
        settings(latents, folder / "flow at once", "stage1_gdn"),
        dataclasses.replace(flow("flow mixed"), data=((latents, 1.0), (more, 3.0))),
        flow("flow padded", frames=41, pad=True, init={"vae": init["vae"]}),
        flow("flow unclipped", steps=1, grad_clip=0.0),
        dataclasses.replace(flow("flow poisoned", steps=6, optimizer="muon"), data=((poisoned, 1.0),)),
        flow("flow muon", optimizer="muon"),
        flow("flow muon halved", optimizer="muon", steps=2),
        flow("flow muon halved", optimizer="muon"),
        dataclasses.replace(flow("gdn", steps=1), config=dataclasses.replace(MICRO, softmax_every=0)),
        dataclasses.replace(flow("plucker", steps=1), config=dataclasses.replace(MICRO, camera_branches="plucker")),
        dataclasses.replace(flow("from video", steps=1, learning_rate=0.0), init={"dit": str(folder / "video")}),
        settings(latents, folder / "hybrid", "stage2_hybrid", init=gdn, steps=1, learning_rate=0.0),
        settings(latents, folder / "refiner", "stage5_refiner", init=init, steps=1),
        dataclasses.replace(settings(latents, folder / "causal", "stage4_causal", init, steps=2), config=CAUSAL),
        settings(latents, folder / "diverged", "stage1_gdn", steps=2),
    ]
    fit(folder / "ray", one)
    cut = settings(latents, folder / "causal cut", "stage4_causal", init, steps=2, context_parallel=2)
    two = [flow("flow grown"), settings(clips, folder / "vae at two"), dataclasses.replace(cut, config=CAUSAL)]
    two += [flow(f"flow grown, zero {values['zero_stage']}", **values) for values in by_zero_stage[1:]]
    two += [flow(f"flow zero {values['zero_stage']}", **values) for values in by_zero_stage]
    two += [flow(f"flow cut, zero {values['zero_stage']}", context_parallel=2, **values) for values in by_zero_stage]
    lean: dict[str, Any] = dict(zero_stage=3, ema=0.0, offload=True, checkpoint_blocks=True)
    two += [
        flow("flow cut in a ring", context_parallel=2, attention_exchange="ring", checkpoint_blocks=True),
        flow("flow padded, cut", frames=41, pad=True, context_parallel=2),  # the second worker holds padding alone
        flow("flow zero 2, offloaded", zero_stage=2, offload=True, steps=2),
        flow("flow zero 2, offloaded", zero_stage=2, offload=True),
        flow("flow zero 3, offloaded", steps=2, **lean),
        flow("flow zero 3, offloaded", **lean),
    ]
    for n in (0, 1, 2, 3):
        values = dict(zero_stage=n, steps=6, ema=0.0 if n == 3 else 0.9)
        two.append(dataclasses.replace(flow(f"flow poisoned, zero {n}", **values), data=((poisoned, 1.0),)))
    noticed = settings(latents, folder / "noticed", "stage1_gdn", steps=200, checkpoint_minutes=0, workers=2)
    fit(folder / "ray", [*two, forty_steps(latents, folder / "whole"), noticed], workers=2, notice=folder / "notice")
    fit(folder / "ray", [flow("flow cut, zero 1", context_parallel=2, zero_stage=1)], workers=4)
    return folder


@pytest.mark.parametrize("name", ["vae", "flow", "flow muon"])
def test_a_run_stopped_at_step_2_ends_as_if_it_never_stopped(name, runs):
    assert list(losses(runs / name)) == [1, 2, 3, 4]
    assert losses(runs / name) == losses(runs / f"{name} halved")
    ours, theirs = weights(runs / name), weights(runs / f"{name} halved")
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "other"), [("flow", "flow at once"), ("vae", "vae at two")])
def test_a_seed_fixes_a_run_however_its_batches_are_shared_out(name, other, runs):
    assert losses(runs / other) == pytest.approx(losses(runs / name), rel=1e-4)
    assert alike(runs / name, runs / other)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_workers_train_like_one_that_accumulates(zero_stage, runs):
    assert losses(runs / f"flow zero {zero_stage}") == pytest.approx(losses(runs / "flow"), rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_workers_that_share_clips_train_like_one(zero_stage, runs):
    # ZeRO 1 ran on four workers: two share a clip, and two such pairs a batch.
    name = f"flow cut, zero {zero_stage}"
    assert losses(runs / name) == pytest.approx(losses(runs / "flow"), rel=1e-4)
    assert zero_stage == 3 or alike(runs / name, runs / "flow")  # whose weights are no average


@pytest.mark.parametrize("name", ["flow padded", "flow padded, cut"])
def test_padded_clips_train_as_without_padding(name, runs):
    assert losses(runs / name) == pytest.approx(losses(runs / "flow"), rel=1e-4)
    assert len(read_video(runs / "flow padded" / "sample.mp4")) == FRAMES


def test_more_workers_than_heads_share_attention_in_a_ring(runs):
    assert MICRO.num_heads < 2
    assert losses(runs / "flow cut in a ring") == pytest.approx(losses(runs / "flow"), rel=1e-4)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_saves_memory_changes_no_step(zero_stage, runs):
    # Both stopped at step 2; under ZeRO 3 the blocks were computed again too.
    plain, saving = runs / f"flow zero {zero_stage}", runs / f"flow zero {zero_stage}, offloaded"
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)  # norms of gradients are summed in another order
    assert alike(saving, plain)


def test_stage_2_begins_with_the_weights_of_stage_1(runs):
    gdn, hybrid = weights(runs / "gdn"), weights(runs / "hybrid")
    assert set(gdn) - set(hybrid) == {f"transformer/blocks.3.attn.conv_k{kind}.weight" for kind in ("", "_cam")}
    assert set(hybrid) < set(gdn) and all(torch.equal(hybrid[name], gdn[name]) for name in hybrid)


def test_stage_1_begins_with_the_weights_of_a_sana_video(runs):
    expected = sana_video.from_sana_video(load_file(runs / "video/diffusion_pytorch_model.safetensors"), MICRO)
    trained = weights(runs / "from video")
    assert all(torch.equal(trained[f"transformer/{name}"], expected[name].half()) for name in expected)


def test_a_run_draws_from_several_corpora(runs):
    assert list(losses(runs / "flow mixed")) == [1, 2, 3, 4] and losses(runs / "flow mixed") != losses(runs / "flow")


@pytest.mark.parametrize("name", ["flow grown", "flow grown, zero 2", "flow grown, zero 3"])
def test_a_run_goes_on_with_more_workers(name, runs):
    assert list(losses(runs / name)) == [1, 2, 3, 4]
    assert losses(runs / name) == pytest.approx(losses(runs / "flow"), rel=1e-4)
    assert name == "flow grown, zero 3" or alike(runs / name, runs / "flow")  # whose weights are no average
    assert not list((runs / name / "checkpoints").glob("*.universal"))


@pytest.mark.parametrize("name", ["flow", "flow zero 2", "flow zero 3"])
def test_a_record_says_how_the_run_does(name, runs):
    record = log.read(runs / name)[-1]
    workers = 1 if name == "flow" else 2
    assert record["tokens_per_second"] == pytest.approx(record["clips_per_second"] * 3 * 2 / workers, abs=1)
    assert record["grad_norm"] > 0 and 0 <= record["data_wait"] < 1 and record["memory_gib"] > 0.1
    assert "tokens_per_second" not in log.read(runs / "vae")[-1]


def test_a_killed_worker_changes_nothing(runs, tmp_path, capfd):
    def kill_one():
        while not (tmp_path / "killed/checkpoints/step-00000020").is_dir():
            time.sleep(0.02)
        here = psutil.Process().children(recursive=True)  # other programs may train beside these tests
        next(each for each in here if "RayTrainWorker" in each.name()).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    run.launch(forty_steps(str(runs / "latents"), tmp_path / "killed"))
    killer.join()
    assert "a worker was lost: going on from step" in capfd.readouterr().err
    whole, killed = losses(runs / "whole"), losses(tmp_path / "killed")
    assert list(killed) == list(range(1, 41)) and killed == pytest.approx(whole, rel=1e-6)


def test_a_machines_notice_saves_the_step_that_was_reached(runs):
    steps = sorted(int(path.name.removeprefix("step-")) for path in (runs / "noticed/checkpoints").iterdir())
    assert len(steps) == 2 and 0 < steps[0] < steps[1] == 200


def test_two_workers_average_and_export_the_same_weights(runs):
    ours, theirs = weights(runs / "flow"), weights(runs / "flow zero 2")
    assert ours.keys() == theirs.keys()
    assert alike(runs / "flow", runs / "flow zero 2")
    partitioned = weights(runs / "flow zero 3")
    assert {key: value.shape for key, value in partitioned.items()} == {key: value.shape for key, value in ours.items()}


def test_weights_say_what_they_read_of_a_camera_and_of_later_chunks(runs):
    assert json.loads((runs / "causal/weights/config.json").read_text())["chunk_causal"]
    assert losses(runs / "causal cut") == pytest.approx(losses(runs / "causal"), rel=1e-4)
    assert len(read_video(runs / "causal" / "sample.mp4")) == FRAMES
    assert json.loads((runs / "plucker/weights/config.json").read_text())["camera_branches"] == "plucker"
    trained = weights(runs / "plucker")
    assert trained["transformer/plucker_embedder.proj.weight"].any()  # both begin with zeros
    assert not trained["transformer/blocks.0.attn.out_proj_cam.weight"].any()
    assert weights(runs / "flow")["transformer/blocks.0.attn.out_proj_cam.weight"].any()


def test_no_clipping_leaves_the_gradients_as_they_are(runs):
    at_first_zero = weights(runs / "flow unclipped")["transformer/blocks.0.cross_attn.proj.weight"]
    assert at_first_zero.abs().max() > 0


def test_a_time_limit_ends_the_run_and_its_schedule(runs):
    records = log.read(runs / "vae timed")
    assert 0 < records[-1]["step"] < 100_000
    assert records[-1]["lr"] < 0.5 * records[0]["lr"]


def test_a_run_leaves_pictures_and_a_weights_folder_with_all_parts(runs):
    for name in ("loss.png", "sample.png", "sample.mp4", "weights/vae/model.safetensors", "weights/config.json"):
        assert (runs / "vae" / name).is_file()
    assert {path.name for path in (runs / "refiner" / "weights").iterdir() if path.is_dir()} == {*FOLDERS.values()}
    assert (runs / "refiner" / "sample.png").is_file()
    assert sorted(run.find_parts([str(runs / "refiner")])) == ["dit", "refiner", "text", "vae"]


@pytest.mark.parametrize("name", ["flow poisoned", *(f"flow poisoned, zero {n}" for n in range(4))])
def test_a_step_that_is_not_finite_changes_nothing(name, runs):
    records = log.read(runs / name)
    rows = Order(5, seed=0).rows(0, 12).reshape(6, 2)
    bad = [step for step in range(1, 7) if 0 in rows[step - 1]]
    assert bad and [record["step"] for record in records if record["skipped"]] == bad
    for step in bad:  # a record tells of the last update
        assert records[step - 1]["loss"] == records[step - 2]["loss"]
    assert all(np.isfinite([record["loss"], record["grad_norm"]]).all() for record in records)
    assert all(tensor.isfinite().all() for tensor in weights(runs / name).values())
    others = losses(runs / "flow poisoned, zero 0")
    assert name == "flow poisoned" or losses(runs / name) == pytest.approx(others, rel=1e-4)


def test_training_that_diverges_says_what_to_change(runs, tmp_path, capfd):
    good, bad = runs / "diverged", make_latents(tmp_path / "bad", poisoned=range(5))
    run._write_record(settings(str(runs / "latents"), good, "stage1_gdn", steps=2))
    kept = weights(good)
    with pytest.raises(Exception) as error:
        run.launch(settings(bad, good, "stage1_gdn", steps=40, checkpoint_steps=1))
    said = user_message(error.value) or ""
    assert "diverged before step 12" in said and "lower learning_rate (now 0.001)" in said and "from step 2" in said
    assert "counted as `skipped` in metrics.jsonl" in capfd.readouterr().err
    newest = checkpoint.newest(good / "checkpoints")
    assert newest and newest.name == "step-00000002"
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(good).items())


def test_a_truncated_checkpoint_is_not_resumed_from(tmp_path):
    def write_files(folder):
        (folder / "state").write_bytes(bytes(9))

    for step in (1, 2):
        checkpoint.write(tmp_path, step, write_files, rank=0, barrier=lambda: None)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / "state").write_bytes(bytes(8))
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    (tmp_path / "step-00000001" / "COMPLETE").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_processes_decode_what_the_trainer_itself_would(tmp_path):
    stage = dataclasses.replace(stages.get("stage0_vae", "tiny"), frames=FRAMES, window=9, batch_size=2)
    source = feed.open_source(stage, MICRO, make_clips(tmp_path))
    here, elsewhere = (
        list(feed.stream(source, Share(0, 1, 2), 1, 4, torch.device("cpu"), processes)) for processes in (0, 2)
    )
    assert len(here) == 4 and here[0]["frames"].shape == (2, 9, 32, 64, 3)
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(here, elsewhere, strict=True))


def test_a_damaged_picture_names_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("longtake.platform.data.store.encode_frame", lambda _: b"no picture")
    stage = dataclasses.replace(stages.get("stage0_vae", "tiny"), frames=FRAMES, window=9, batch_size=2)
    with pytest.raises(ValueError, match=r"/a\.parquet: a stored frame is damaged"):
        feed.open_source(stage, MICRO, make_clips(tmp_path))


@pytest.mark.parametrize("processes", [0, 1])
def test_what_a_decoding_process_finds_wrong_is_said_in_one_line(tmp_path, processes):
    stage = dataclasses.replace(stages.get("stage0_vae", "tiny"), frames=81, window=FRAMES, batch_size=2)
    source = dataclasses.replace(feed.open_source(stage, MICRO, make_clips(tmp_path)), window=81)
    said = f"a clip has {FRAMES} frames: set window={FRAMES} or less with --set"
    with pytest.raises(ValueError, match=f"^{said}$") as error:
        next(feed.stream(source, Share(0, 1, 2), 0, 1, torch.device("cpu"), processes))
    assert user_message(error.value) == said


def test_corpora_are_mixed_the_same_from_files_and_from_memory(tmp_path):
    corpora = ((make_latents(tmp_path / "a"), 2.0), (make_latents(tmp_path / "b", 3, seed=1), 1.0))
    stage = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=FRAMES, window=9, seed=4)
    source, cpu = feed.open_sources(stage, MICRO, corpora), torch.device("cpu")
    assert isinstance(source, feed.Mixed)
    share = Share(1, 2, 6)  # micro-batches 1, 3, 5: every other six samples
    batches = list(feed.stream(source, share, 0, 3, cpu))
    for batch, kept in zip(batches, feed.draw(source, cpu, share, 0, 3, cpu), strict=True):
        assert all(torch.equal(batch[name], kept[name]) for name in batch)
    each = [feed.open_source(stage, MICRO, uri) for uri, _ in corpora]
    for number, batch in enumerate(batches):
        for one, (first, places) in zip(each, source.mixture.parts(12 * number + 6, 6), strict=True):
            if len(places):
                assert np.array_equal(batch["latents"][places], one.batch(first, len(places))["latents"])


def test_missing_clips_are_reported_before_ray_starts(tmp_path):
    with pytest.raises(ValueError, match="render-worlds"):
        run.launch(settings(str(tmp_path / "none"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_not_overwritten(tmp_path):
    clips = make_clips(tmp_path / "clips")
    run._write_record(settings(clips, tmp_path / "run"))
    with pytest.raises(ValueError, match="choose another --run"):
        run._write_record(settings(clips, tmp_path / "run", seed=1))

"""Encoded clips: how they are stored, and how clips become them."""

import dataclasses

import numpy as np
import pytest
import torch

from longtake.jobs import encode_latents
from longtake.model import presets
from longtake.model.objectives.vae import VAEObjective
from longtake.model.vae import encode_frames
from longtake.platform.data.clip import Clip, Split
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.store import ClipStore
from longtake.platform.train import stages
from longtake.platform.train.feed import open_source

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

CONFIG = dataclasses.replace(
    presets.get("tiny"),
    latent_channels=8,
    image_size=(32, 64),
    vae=dict(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=(0, 0, 0, 0, 1),
        decoder_block_out_channels=(8, 8, 16),
        decoder_layers_per_block=(1, 0, 0, 0),
        upsample_factor=(1, 1, 2),
        decoder_spatial_padding_mode="zeros",
    ),
)


def make_clip(key, frames, seed=0, size=(32, 64), split: Split = "train"):
    video = np.random.default_rng(seed).integers(0, 255, (frames, *size, 3), np.uint8)
    c2w = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    c2w[:, 0, 3] = np.arange(frames)
    return Clip(key, video, c2w, np.full((frames, 4), 32, np.float32), 16, "a hall", 0.5, "CC0-1.0", split=split)


@pytest.fixture
def trained(tmp_path):
    """A weights folder with a random autoencoder."""
    torch.manual_seed(0)
    objective = VAEObjective(CONFIG)
    objective.get_buffer("latent_moments").copy_(torch.tensor([[0.5], [1.25]]).expand(2, 8))
    objective.export(tmp_path / "weights", torch.float32)
    return str(tmp_path / "weights"), objective.vae


def test_an_encoded_clip_comes_back_as_it_was_stored(tmp_path):
    store = LatentStore(str(tmp_path))
    rng = np.random.default_rng(0)
    poses, pinholes = rng.normal(size=(9, 4, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    latents = rng.normal(size=(8, 2, 1, 2)).astype(np.float16)
    clips = [
        EncodedClip("one", latents, poses, pinholes, "a hall", 12.0, "test", "MIT"),
        EncodedClip("two", latents, poses, pinholes),
    ]
    store.write_shard("a", clips)
    assert store.shards() == ["a"] and len(store) == 2
    found = list(store.clips("test"))
    assert [clip.key for clip in found] == ["one"]
    for name, value in vars(clips[0]).items():
        np.testing.assert_array_equal(getattr(found[0], name), value)


def test_poses_of_another_length_are_refused():
    with pytest.raises(ValueError, match="intrinsics"):
        EncodedClip(
            "x", np.zeros((8, 2, 1, 2), np.float16), np.zeros((9, 4, 4), np.float32), np.zeros((8, 4), np.float32)
        )


def test_every_clip_is_encoded_once_and_a_second_run_does_nothing(ray_cluster, trained, tmp_path):
    folder, vae = trained
    clips, latents = ClipStore(tmp_path / "clips"), str(tmp_path / "latents")
    clips.write_shard("a", [make_clip("one", 9), make_clip("two", 20, seed=1, split="test")])
    clips.write_shard("b", [make_clip("three", 9, seed=2)])
    encode_latents.encode(CONFIG, clips.uri, latents, folder, frames=9, batch=2)
    found = {clip.key: clip for clip in LatentStore(latents).clips()}
    assert sorted(found) == ["one", "three", "two", "two@9"]
    true = clips.read("two")
    expected = encode_frames(vae, torch.from_numpy(true.frames[None, 9:18]))[0].detach().numpy()
    np.testing.assert_allclose(found["two@9"].latents, expected, atol=2e-2)
    np.testing.assert_allclose(found["two@9"].c2w[:, 0, 3], 0.5 * np.arange(9, 18))
    assert found["two@9"].split == "test" and found["two@9"].caption == "a hall"

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    encode_latents.encode(CONFIG, clips.uri, latents, folder, frames=9, batch=2)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    with pytest.raises(ValueError, match="choose another --latents"):
        encode_latents.encode(CONFIG, clips.uri, latents, folder, frames=17, batch=2)


def test_clips_of_a_bucket_become_latents_that_a_stage_reads(s3_server, trained):
    import boto3

    boto3.client("s3").create_bucket(Bucket="latents")
    store = ClipStore("s3://latents/clips")
    store.write_shard("a", [make_clip("one", 9), make_clip("two", 9, seed=1)])
    encoder = encode_latents.ShardEncoder(CONFIG, store.uri, "s3://latents/encoded", trained[0], 9, 2)
    assert encoder({"shard": np.array(["a"])})["clips"].tolist() == [2]
    stage = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=9, window=9)
    batch = open_source(stage, CONFIG, "s3://latents/encoded").batch(0, 2)
    assert batch["latents"].shape == (2, 8, 2, 1, 2) and batch["c2w"].shape == (2, 9, 4, 4)
    with pytest.raises(ValueError, match="encode with --preset tiny --frames 81"):
        open_source(dataclasses.replace(stage, frames=81), CONFIG, "s3://latents/encoded")


def test_clips_that_do_not_fit_the_model_are_refused(trained, tmp_path):
    store = ClipStore(tmp_path / "clips")
    store.write_shard("short", [make_clip("one", 8)])
    store.write_shard("large", [make_clip("one", 9, size=(64, 64))])
    encoder = encode_latents.ShardEncoder(CONFIG, store.uri, str(tmp_path / "latents"), trained[0], 9, 1)
    with pytest.raises(ValueError, match="lower --frames"):
        list(encoder.encode("short"))
    with pytest.raises(ValueError, match="render clips of that size"):
        list(encoder.encode("large"))


def test_frames_that_no_latent_frame_covers_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="8 k \\+ 1"):
        encode_latents.encode(CONFIG, str(tmp_path / "clips"), str(tmp_path / "latents"), trained[0], 80, 1)

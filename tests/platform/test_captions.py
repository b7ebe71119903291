"""Features of captions from a frozen encoder, stored with the latents and trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from longtake.jobs import encode_latents
from longtake.model import weights
from longtake.model.config import TextConfig
from longtake.model.objectives import Draws, build_objective
from longtake.model.text import build_text_encoder
from longtake.model.vae import build_vae
from longtake.platform.data import captions
from longtake.platform.data.clip import Clip
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.store import ClipStore
from longtake.platform.train import stages
from longtake.platform.train.feed import open_source

pytestmark = pytest.mark.cpu

STAGE = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=9, window=9)
CAPTIONS = ("a hall of stone", "a yard")


@pytest.fixture(scope="module")
def config(small_config):
    return dataclasses.replace(small_config, text=TextConfig(kind="gemma", length=12, dim=32), text_dim=32)


@pytest.fixture(scope="module")
def folder(config, few_words, tmp_path_factory):
    """An autoencoder, and a Gemma-2 of random weights that knows a few words."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    weights.save_part(build_vae(config), folder, "vae", torch.float32)
    few_words.save_pretrained(folder / "tokenizer")
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8, pad_token_id=0
    )
    heads: dict[str, Any] = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    Gemma2Model(Gemma2Config(**sizes, **heads)).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def latents(config, folder, tmp_path_factory):
    store = ClipStore(tmp_path_factory.mktemp("clips"))
    height, width = config.image_size
    poses, pinholes = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1)), np.full((9, 4), 32, np.float32)
    frames = np.zeros((9, height, width, 3), np.uint8)
    clips = [Clip(text[-4:], frames, poses, pinholes, 16, text, 1.0, "CC0-1.0") for text in CAPTIONS]
    store.write_shard("a", clips)
    encoded = str(tmp_path_factory.mktemp("latents"))
    encode_latents.ShardEncoder(config, store.uri, encoded, str(folder), 9, 2)({"shard": np.array(["a"])})
    return encoded


def test_a_stage_reads_what_the_encoder_makes_of_captions(config, folder, latents):
    features, mask = build_text_encoder(config, str(folder)).encode(list(CAPTIONS))
    batch = open_source(STAGE, config, latents).batch(0, 2)
    order = np.argsort(batch["tokens_mask"].sum(1))[::-1]  # the longer caption first, however clips were drawn
    assert "tokens" not in batch and batch["tokens_mask"][order].tolist() == mask.tolist()
    for found, made, real in zip(batch["text"][order], features.float().numpy(), mask.numpy(), strict=True):
        np.testing.assert_allclose(found[real].astype(np.float32), made[real], rtol=1e-2, atol=1e-3)
        assert not found[~real].any()


def test_a_world_model_trains_on_them(config, latents):
    objective: Any = build_objective("flow", config, {"caption_dropout": 0.0})
    assert not any(name.startswith("text.") for name in objective.state_dict())
    torch.nn.init.normal_(objective.world_model.final_layer.linear.weight, std=0.1)
    for block in objective.world_model.blocks:
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.5)
    batch = {name: torch.from_numpy(x) for name, x in open_source(STAGE, config, latents).batch(0, 2).items()}
    loss = objective(batch, Draws(0, range(2), torch.device("cpu")))[0]
    loss.backward()
    other = objective(batch | {"text": batch["text"].flip(0)}, Draws(0, range(2), torch.device("cpu")))[0]
    assert loss.isfinite() and loss != other
    assert objective.world_model.y_embedder.y_proj.fc1.weight.grad.abs().max() > 0


def test_a_refiner_that_reads_captions_its_own_way_finds_their_features(
    config, folder, latents, small_refiner_text, tmp_path, monkeypatch
):
    """Of width 32 as stage 1's, but through Gemma-3: told apart by the configuration alone."""
    own = dataclasses.replace(config, refiner=dataclasses.replace(config.refiner, text_dim=32), text_dim=31)
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "refiner_text").symlink_to(small_refiner_text)
    monkeypatch.setattr(captions.RefinerTextEncoder.__init__, "__defaults__", (16, torch.float32))
    encoder = captions.CaptionEncoder(own, tmp_path, torch.device("cpu"))
    made = list(encoder(LatentStore(latents).clips()))
    expected, mask = captions.RefinerTextEncoder(small_refiner_text).encode([clip.caption for clip in made])
    assert mask.all()
    for clip, features in zip(made, expected, strict=True):
        assert clip.text is not None and clip.refiner_text is not None
        np.testing.assert_allclose(clip.refiner_text.astype(np.float32), features.numpy(), rtol=1e-2, atol=1e-2)
    captions.check_encoder(tmp_path)
    (tmp_path / "refiner_text").unlink()
    (tmp_path / "refiner_text").mkdir()
    with pytest.raises(ValueError, match="Gemma-3"):
        captions.check_encoder(tmp_path)


def test_latents_without_features_and_folders_without_gemma_are_refused(config, latents, folder, tmp_path):
    clips = [dataclasses.replace(clip, text=None) for clip in LatentStore(latents).clips()]
    LatentStore(str(tmp_path / "bare")).write_shard("a", clips)
    with pytest.raises(ValueError, match="encode it again"):
        open_source(STAGE, config, str(tmp_path / "bare"))
    captions.check_encoder(folder)
    with pytest.raises(ValueError, match="Gemma-2, give its folder"):
        captions.check_encoder(tmp_path)

"""What a training command makes of its arguments, and which it refuses, before anything starts."""

import contextlib
import dataclasses
import json

import pytest

from longtake.model import presets
from longtake.model.weights import FOLDERS, save_config
from longtake.platform.train import run, stages

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["--set", "steps=many"], "must be of type int"),
        (["--set", "batch_size"], "field=value"),
        (["--workers", "3"], "must be a multiple of workers / context_parallel"),
        (["--workers", "3", "--set", "context_parallel=2"], "3 workers must be a multiple of context_parallel 2"),
        (["--set", "attention_exchange=star"], "attention_exchange 'star' must be heads or ring"),
        (["--workers", "16", "--set", "context_parallel=16"], "must be at most 11, the latent frames of a clip"),
        (["--max-minutes", "0"], "must be positive"),
        (["--data", "more=0"], "weights of corpora must be positive"),
        (["--data", "latents=2"], "is given twice"),
        (["--init", "."], "neither a run nor a weights folder"),
        (["--set", "offload=True"], "offload is ZeRO's"),
        (["--set", "pad=True", "--set", "attention_exchange=ring"], "pad is for .* attention_exchange=heads"),
        (["--set", "model.camera_branches=rays"], "camera_branches 'rays' must be one of both, plucker, ucpe, none"),
        (["--set", "checkpoint_blocks=True"], "exclude each other: set compile=default"),
        (["--set", "optimizer=muon", "--set", "zero_stage=2"], "zero_stage=0"),
    ],
)
def test_a_wrong_argument_ends_before_training(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run.run_stage("stage1_gdn", ["--data", "latents", *arguments])


def test_a_stage_that_goes_on_from_another_asks_for_its_weights():
    with pytest.raises(ValueError, match="starts from the weights of stage2_hybrid: give its run with --init"):
        run.run_stage("stage3_minute", ["--data", "latents"])


@pytest.mark.parametrize(
    ("trained", "softmax_every", "stage", "says"),
    [
        ("stage1_gdn", 0, "stage3_minute", "starts from the weights of stage2_hybrid: .* is a run of stage1_gdn"),
        (None, 0, "stage3_minute", "GDN in every block, which stage3_minute does not train: train stage2_hybrid"),
        (None, 4, "stage1_gdn", "softmax attention in every 4th block, which stage1_gdn does not train"),
        ("stage1_gdn", 0, "stage2_hybrid", None),
        (None, 4, "stage2_hybrid", None),
        ("stage3_minute", 4, "stage3_minute", None),
        ("stage5_refiner", 4, "stage3_minute", None),
    ],
)
def test_a_stage_looks_at_where_its_weights_come_from(trained, softmax_every, stage, says, tmp_path, capsys):
    for part in ("transformer", "text_encoder"):
        (tmp_path / "weights" / part).mkdir(parents=True)
    save_config(dataclasses.replace(presets.get("tiny"), softmax_every=softmax_every), tmp_path / "weights")
    if trained:
        (tmp_path / "stage.json").write_text(json.dumps({"stage": dataclasses.asdict(stages.get(trained, "tiny"))}))
    arguments = ["--data", "latents", "--init", str(tmp_path), "--dry-run"]
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
        run.run_stage(stage, arguments)


@pytest.mark.parametrize(
    ("trained", "asked", "refused"),
    [("plucker", "both", True), ("plucker", "plucker", False), ("none", "ucpe", True), ("both", "ucpe", False)],
)
def test_weights_that_read_less_of_a_camera_are_not_trained_with_more(trained, asked, refused, tmp_path, capsys):
    for part in ("transformer", "text_encoder"):
        (tmp_path / part).mkdir()
    save_config(dataclasses.replace(presets.get("tiny"), camera_branches=trained), tmp_path)
    arguments = ["--data", "latents", "--init", str(tmp_path), "--dry-run", "--set", f"model.camera_branches={asked}"]
    with (
        pytest.raises(ValueError, match=f"--set model.camera_branches={trained}")
        if refused
        else contextlib.nullcontext()
    ):
        run.run_stage("stage3_minute", arguments)


@pytest.mark.parametrize("stage", ["stage3_minute", "stage4_causal"])
def test_weights_that_see_no_later_chunk_are_not_trained_to_see_one(stage, tmp_path, capsys):
    for part in ("transformer", "text_encoder"):
        (tmp_path / part).mkdir()
    save_config(dataclasses.replace(presets.get("tiny"), chunk_causal=True), tmp_path)
    refused = pytest.raises(ValueError, match="trains a network that does: choose weights of a stage before")
    with refused if stage == "stage3_minute" else contextlib.nullcontext():
        run.run_stage(stage, ["--data", "latents", "--init", str(tmp_path), "--dry-run"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pad=True", "a chunk-causal model trains with pad=False"),
        ("attention_exchange=ring", "and attention_exchange=heads"),
        ("context_parallel=41", "context_parallel 41 must be at most 40, the chunks of a clip"),
    ],
)
def test_what_a_chunk_causal_model_is_not_trained_with(change, message):
    with pytest.raises(ValueError, match=message):
        run.run_stage("stage4_causal", ["--data", "latents", "--set", change, "--workers", "41"])


def test_a_stage_trains_the_preset_with_its_own_values(capsys):
    run.run_stage("stage1_gdn", ["--data", "latents", "--dry-run", "--set", "model.mlp_ratio=1.0"])
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["softmax_every"] == 0 and config["mlp_ratio"] == 1.0
    with pytest.raises(ValueError, match=r"model\.depht is no field"):
        run.run_stage("stage1_gdn", ["--data", "latents", "--set", "model.depht=1"])


def test_a_dry_run_prints_the_resolved_settings(capsys):
    run.run_stage("stage0_vae", ["--data", "clips", "--dry-run", "--set", "options.kl_weight=0.5", "--steps", "9"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["stage"]["options"] == {"squared_weight": 40.0, "kl_weight": 0.5} and printed["stage"]["steps"] == 9


def test_an_autoencoder_leaves_what_was_trained_on_its_old_latents(tmp_path, capsys):
    for name in FOLDERS.values():
        (tmp_path / name).mkdir()
    run.run_stage("stage0_vae", ["--data", "clips", "--dry-run", "--init", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["init"] == {"vae": str(tmp_path)}


def test_a_decoder_alone_needs_its_encoder():
    with pytest.raises(ValueError, match="freeze_encoder trains the decoder of an autoencoder that exists"):
        run.run_stage("stage0_vae", ["--data", "clips", "--set", "options.freeze_encoder=True"])


@pytest.mark.parametrize(
    ("given", "corpora"),
    [
        (["s3://a/b"], (("s3://a/b", 1.0),)),
        (["s3://a=3", "/b=0.5"], (("s3://a", 3.0), ("/b", 0.5))),
        (["/runs/lr=low"], (("/runs/lr=low", 1.0),)),
    ],
)
def test_stores_are_given_with_their_weights(given, corpora):
    assert run._corpora(given) == corpora


@pytest.mark.parametrize(
    ("place", "stage", "sizes", "says"),
    [
        ("", "stage1_gdn", {}, None),
        ("transformer", "stage1_gdn", dict(in_channels=16, out_channels=16, patch_size=(1, 2, 2)), None),
        (
            "",
            "stage1_gdn",
            dict(num_layers=2, num_attention_heads=3, attention_head_dim=64),
            "of num_layers 2, num_attention_heads 3, attention_head_dim 64, preset 'tiny' needs num_layers 8",
        ),
        ("", "stage1_gdn", dict(attention_bias=True), "attn1.to_k.bias does not belong to a SANA-Video"),
        ("", "stage0_vae", {}, "is a SANA-Video, which stage0_vae does not start from: train stage1_gdn from it first"),
        ("", "stage2_hybrid", {}, "is a SANA-Video, which stage2_hybrid does not start from"),
    ],
)
def test_stage_1_starts_from_a_sana_video_that_fits(place, stage, sizes, says, sana_video_of, tmp_path, capsys):
    sana_video_of(presets.get("tiny"), **sizes).save_pretrained(tmp_path / "video" / place)
    # What an earlier run trained beside another world model, and a pipeline's own for other latents and captions.
    for folder in ("run/transformer", "run/text_encoder", "video/vae", "video/text_encoder"):
        (tmp_path / folder).mkdir(parents=True)
    arguments = ["--data", "latents", "--init", str(tmp_path / "run"), "--init", str(tmp_path / "video"), "--dry-run"]
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
        run.run_stage(stage, arguments)
    if says:
        return
    printed = capsys.readouterr()
    assert json.loads(printed.out)["init"] == {"dit": str(tmp_path / "video" / place)}
    (notice,) = printed.err.splitlines()
    assert ("204 of SANA-Video's 208 tensors start" if sizes else "208 of SANA-Video's 208 tensors start") in notice
    assert "attn.beta_proj" in notice and ("x_embedder" in notice) == bool(sizes) and "cross_attn" not in notice

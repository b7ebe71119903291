"""The public refiner's own text features."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.sana_wm.refiner import SanaWMLTX2Refiner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from longtake.model.refiner.parity import diffusers_transformer
from longtake.model.refiner.text import RefinerTextEncoder

pytestmark = pytest.mark.cpu

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Gemma-3 and connectors of random weights that know a few words."""
    folder = tmp_path_factory.mktemp("refiner_text")
    torch.manual_seed(0)
    words = ["<pad>", "<bos>", "<unk>", "a", "hall", "of", "stone", "yard"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named: dict[str, Any] = dict(pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "tokenizer")
    text: dict[str, Any] = dict(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        rope_type="split",
    ).save_pretrained(folder / "connectors")
    return folder


def test_features_are_those_of_diffusers_refiner(folder, config):
    encoder = RefinerTextEncoder(folder, LENGTH, torch.float32)
    connectors = LTX2TextConnectors.from_pretrained(folder / "connectors")
    parts: Any = {"transformer": diffusers_transformer(config), "connectors": connectors}
    parts |= {"tokenizer": encoder.tokenizer, "text_encoder": encoder.model}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    peer = SanaWMLTX2Refiner(**parts, scheduler=scheduler, text_max_sequence_length=LENGTH)
    captions = ["a hall of stone ", "a yard"]
    features, mask = encoder.encode(captions)
    for row, caption in enumerate(captions):
        expected, valid = peer._encode_prompt(caption, device=torch.device("cpu"), dtype=torch.float32)
        torch.testing.assert_close(features[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(mask[row : row + 1], valid.bool())


def test_a_folder_without_connectors_is_refused_before_anything_is_loaded(folder, tmp_path):
    (tmp_path / "text_encoder").symlink_to(folder / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    with pytest.raises(ValueError, match="has no connectors/config.json"):
        RefinerTextEncoder(tmp_path)

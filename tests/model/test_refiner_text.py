"""The public refiner's own text features."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.sana_wm.refiner import SanaWMLTX2Refiner

from longtake.model.refiner.parity import diffusers_transformer
from longtake.model.refiner.text import RefinerTextEncoder

pytestmark = pytest.mark.cpu

LENGTH = 16


def test_features_are_those_of_diffusers_refiner(small_refiner_text, config):
    encoder = RefinerTextEncoder(small_refiner_text, LENGTH, torch.float32)
    connectors = LTX2TextConnectors.from_pretrained(small_refiner_text / "connectors")
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


def test_a_folder_without_connectors_is_refused_before_anything_is_loaded(small_refiner_text, tmp_path):
    (tmp_path / "text_encoder").symlink_to(small_refiner_text / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(small_refiner_text / "tokenizer")
    with pytest.raises(ValueError, match="has no connectors/config.json"):
        RefinerTextEncoder(tmp_path)

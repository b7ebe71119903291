import pytest
import torch

from longtake.model.text import ByteTextEncoder, build_text_encoder, tokenize

pytestmark = pytest.mark.cpu


def test_captions_become_padded_bytes():
    ids, mask = tokenize(["ab", ""], 4)
    assert ids.tolist() == [[98, 99, 0, 0], [33, 0, 0, 0]]
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_captions_longer_than_the_encoder_are_cut():
    ids, mask = tokenize(["ä" * 9], 5)
    assert ids.shape == (1, 5) and mask.all()


def test_padding_does_not_change_the_features_of_a_caption(config):
    torch.manual_seed(0)
    encoder = ByteTextEncoder(config.text).eval()
    features, mask = encoder.encode(["a hall", "a hall of stone"])
    alone, _ = encoder.encode(["a hall"])
    torch.testing.assert_close(features[0][mask[0]], alone[0][mask[0]])


def test_gemma_without_its_folder_is_refused_with_what_to_give():
    from longtake.model import presets

    with pytest.raises(ValueError, match="text_encoder/"):
        build_text_encoder(presets.get("sana-wm"))

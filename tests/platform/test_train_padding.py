"""Batches of clips of unlike lengths."""

import dataclasses

import numpy as np
import pytest
import torch

from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.train import feed, stages
from longtake.platform.train.order import Share

pytestmark = pytest.mark.cpu

STAGE = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=25, window=9, pad=True)


@pytest.fixture
def corpora(tmp_path, small_config):
    """Clips of 2 and of 4 latent frames."""
    for frames in (9, 25):
        write_random(LatentStore(str(tmp_path / str(frames))), small_config, frames, 3)
    return (str(tmp_path / "9"), 1.0), (str(tmp_path / "25"), 1.0)


def test_short_clips_are_padded_with_zeros_and_a_camera_that_stands_still(corpora, small_config):
    source = feed.open_sources(STAGE, small_config, corpora)
    assert isinstance(source, feed.Mixed)
    batch = source.batch(0, 8)
    assert batch["latents"].shape == (8, 16, 4, 2, 3) and batch["c2w"].shape == (8, 25, 4, 4)
    assert batch["frames"].dtype == np.int64 and {*batch["frames"]} == {2, 4}
    plain = dataclasses.replace(STAGE, pad=False)
    short = feed.open_source(dataclasses.replace(plain, frames=9), small_config, corpora[0][0])
    whole = feed.open_source(plain, small_config, corpora[1][0])
    counts = dict.fromkeys((2, 4), 0)
    for clip, frames in enumerate(batch["frames"]):
        raw, alone = 8 * frames - 7, (short if frames == 2 else whole).batch(counts[frames], 1)
        counts[frames] += 1
        assert np.array_equal(batch["latents"][clip, :, :frames], alone["latents"][0])
        assert not batch["latents"][clip, :, frames:].any()
        for name in ("c2w", "intrinsics"):
            assert np.array_equal(batch[name][clip, :raw], alone[name][0])
            assert (batch[name][clip, raw:] == alone[name][0, -1]).all()
    cpu, share = torch.device("cpu"), Share(0, 1, 4)
    streamed, kept = next(feed.stream(source, share, 0, 1, cpu)), next(feed.draw(source, cpu, share, 0, 1, cpu))
    assert all(torch.equal(streamed[name], kept[name]) for name in batch)


def test_clips_longer_than_the_stage_are_refused(corpora, small_config):
    with pytest.raises(
        ValueError, match="0: 4 latent frames from 25 raw ones do not fit a stage of 3 from 17: set frames=25"
    ):
        feed.open_sources(dataclasses.replace(STAGE, frames=17), small_config, corpora)


def test_a_length_that_no_latent_frames_fill_is_refused(corpora, small_config):
    with pytest.raises(ValueError, match="at 27 frames"):
        feed.open_sources(dataclasses.replace(STAGE, frames=27), small_config, corpora)


def test_without_padding_a_clip_of_another_length_is_refused(corpora, small_config):
    with pytest.raises(ValueError, match="at 25 frames"):
        feed.open_sources(dataclasses.replace(STAGE, pad=False), small_config, corpora)

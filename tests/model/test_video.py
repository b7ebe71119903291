"""A video from its image to its frames, through all parts."""

import dataclasses

import numpy as np
import pytest

from longtake.model.camera import parse_actions, repeated_actions
from longtake.model.config import SamplerConfig
from longtake.model.pipeline import WorldPipeline
from longtake.model.video import make_video

pytestmark = pytest.mark.cpu

FEW = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1)


@pytest.fixture
def image(config):
    return np.random.default_rng(0).integers(0, 256, (*config.image_size, 3), dtype=np.uint8)


@pytest.fixture
def streaming(config):
    return dataclasses.replace(
        config,
        chunk_causal=True,
        chunk_window=1,
        sampler=FEW,
        refiner=dataclasses.replace(config.refiner, block_size=3, window=4),
    )


def made(pipeline, image, frames=72, **options):
    path = parse_actions(f"w-{frames}", image_size=pipeline.config.image_size, fps=pipeline.config.fps)
    return list(make_video(pipeline, image, "a hall", path, seed=3, **options))


def test_chunks_go_through_all_stages_one_after_another(streaming, image):
    told = []
    parts = made(
        WorldPipeline.from_config(streaming), image, told=lambda stage, done, total: told.append((stage, done))
    )
    assert [len(part) for part in parts] == [1, 24, 24, 24]
    # Of the first chunk: the image's latent, then three that are refined and decoded before there is a second chunk.
    assert told[:5] == [("stage 1", 1), ("refine", 1), ("decode", 1), ("refine", 4), ("decode", 4)]
    assert told[5] == ("stage 1", 2) and told[-1] == ("decode", 10)


def test_in_stages_it_makes_the_same_video(streaming, image):
    whole = np.concatenate(made(WorldPipeline.from_config(streaming), image))
    for residency in ("stages", "blocks"):
        parts = WorldPipeline.from_config(streaming).modules
        again = np.concatenate(made(WorldPipeline(streaming, parts, residency=residency), image))
        assert np.abs(whole.astype(int) - again).max() <= 1


def test_a_model_of_whole_clips_gives_the_video_at_the_end(config, image):
    told = []
    parts = made(WorldPipeline.from_config(config), image, 16, told=lambda stage, done, total: told.append(stage))
    assert len(np.concatenate(parts)) == 17
    assert list(dict.fromkeys(told)) == ["stage 1", "refine", "decode"]


def test_the_second_stage_can_be_left_out(streaming, image):
    refined = np.concatenate(made(WorldPipeline.from_config(streaming), image))
    parts = WorldPipeline.from_config(streaming, parts=["text", "vae", "dit"])
    plain = np.concatenate(made(parts, image, refine=False))
    assert plain.shape == refined.shape and not np.array_equal(plain[1:], refined[1:])


def test_text_encoders_are_given_up_once_the_text_is_read(streaming, image):
    pipeline = WorldPipeline.from_config(streaming)
    next(iter(make_video(pipeline, image, "a hall", parse_actions("w-24", image_size=streaming.image_size))))
    with pytest.raises(ValueError, match="without 'text'"):
        pipeline.part("text")


def test_one_part_at_a_time_is_on_the_device(config):
    pipeline = WorldPipeline(config, WorldPipeline.from_config(config).modules, "meta", residency="stages")
    assert pipeline.part("dit").get_parameter("final_layer.linear.weight").is_meta


def test_an_unknown_residency_is_refused(config):
    with pytest.raises(ValueError, match="all, stages, blocks"):
        WorldPipeline(config, {}, residency="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "frames", "expected"),
    [
        ("w-40", 40, "w-40"),
        ("w-40,d-8", 64, "w-40,d-8,w-16"),
        ("w-40, d-8", 24, "w-24"),
        ("none-3", 8, "none-3,none-3,none-2"),
    ],
)
def test_actions_begin_again_until_there_are_enough(text, frames, expected):
    assert repeated_actions(text, frames) == expected


def test_actions_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="KEYS-FRAMES"):
        repeated_actions("w", 8)

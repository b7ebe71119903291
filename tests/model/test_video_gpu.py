"""A video whose stages run beside one another on a GPU."""

import dataclasses

import numpy as np
import pytest

from longtake.model.camera import parse_actions
from longtake.model.config import SamplerConfig
from longtake.model.pipeline import WorldPipeline
from longtake.model.video import make_video

pytestmark = pytest.mark.gpu


def test_a_video_made_by_threads_is_that_of_before_there_were_any(small_config):
    few = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1)
    refiner = dataclasses.replace(small_config.refiner, block_size=3, window=4)
    config = dataclasses.replace(small_config, chunk_causal=True, chunk_window=1, sampler=few, refiner=refiner)
    pipeline = WorldPipeline.from_config(config, device="cuda")
    image = np.random.default_rng(0).integers(0, 256, (*config.image_size, 3), dtype=np.uint8)
    path = parse_actions("w-240", image_size=config.image_size, fps=config.fps)
    texts = dict(pipeline.modules)
    videos = []
    for _ in range(3):
        pipeline.modules |= texts  # which the video before gave up
        videos.append(np.concatenate(list(make_video(pipeline, image, "a hall", path, seed=3))).astype(int))
        assert pipeline.settled, "so long a video fills all windows"
    for again in videos[1:]:
        assert np.abs(videos[0] - again).max() <= 1

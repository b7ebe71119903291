"""Scores, on a room whose true pictures are known for every camera."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from longtake.model.camera import Trajectory, parse_actions
from longtake.platform.evaluate import scores

pytestmark = pytest.mark.cpu

SIZE = (120, 200)
ACTIONS = ("w-32", "s-32", "a-32", "d-32", "aw-32", "j-32")
LOW, HIGH = np.array([-3.0, -1.5, -3.0]), np.array([3.0, 1.5, 5.0])


def picture(c2w: np.ndarray, k: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """What a camera sees of a textured box, by casting one ray a pixel."""
    columns, rows = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
    rays = np.stack([(columns - k[2]) / k[0], (rows - k[3]) / k[1], np.ones(SIZE)], axis=-1) @ c2w[:3, :3].T
    eye = c2w[:3, 3]
    with np.errstate(divide="ignore"):
        reach = np.where(rays > 0, (HIGH - eye) / rays, (LOW - eye) / rays)
    wall = reach.argmin(-1)
    hit = eye + rays * np.take_along_axis(reach, wall[..., None], -1)
    across = np.where(wall == 0, hit[..., 2], hit[..., 0]) * 40 + 300 * wall
    down = np.where(wall == 1, hit[..., 2], hit[..., 1]) * 40 + 200
    return cv2.remap(
        texture, across.astype(np.float32), down.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )


@pytest.fixture(scope="module")
def walks() -> dict[str, Trajectory]:
    return {text: parse_actions(text, image_size=SIZE) for text in ACTIONS}


@pytest.fixture(scope="module")
def videos(walks) -> dict[str, np.ndarray]:
    texture = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), dtype=np.uint8)
    texture = cv2.normalize(cv2.GaussianBlur(texture, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    return {
        text: np.stack(
            [picture(c2w, k, texture) for c2w, k in zip(walk.c2w.numpy(), walk.intrinsics.numpy(), strict=True)]
        )
        for text, walk in walks.items()
    }


def followed(video: np.ndarray, walk: Trajectory) -> float:
    return scores.follow(video, walk.c2w.numpy(), walk.intrinsics.numpy(), walk.fps)


@pytest.mark.parametrize("text", ACTIONS)
def test_a_video_follows_its_own_camera_and_no_other(videos, walks, text):
    own = followed(videos[text], walks[text])
    others = {other: followed(videos[other], walks[text]) for other in ACTIONS if other != text}
    assert own > 0.75
    assert max(others.values()) < own - 0.2, others


@pytest.mark.parametrize("text", ACTIONS)
def test_a_still_picture_follows_no_moving_camera(videos, walks, text):
    still = np.repeat(videos[text][:1], len(videos[text]), axis=0)
    assert followed(still, walks[text]) < 0.15


def test_frames_on_both_sides_of_a_cut_are_not_compared(videos, walks):
    part = np.r_[0:12, 21:33]
    camera = walks["d-32"].c2w.numpy()[part], walks["d-32"].intrinsics.numpy()[part], 16.0
    video = videos["d-32"][part].copy()
    whole = scores.follow(video, *camera, part)
    assert whole > 0.9
    assert scores.follow(video, *camera) < whole - 0.1  # tracks break at the cut


def test_noise_follows_nothing(walks):
    noise = np.random.default_rng(1).integers(0, 256, (33, *SIZE, 3), dtype=np.uint8)
    assert followed(noise, walks["w-32"]) < 0.1


def test_a_blank_video_scores_without_error(walks):
    walk = walks["w-32"]
    blank = scores.score(np.zeros((33, *SIZE, 3), np.uint8), walk.c2w.numpy(), walk.intrinsics.numpy(), 16)
    assert blank["follow"] == 0
    assert all(0 <= value <= 1 for value in blank.values())


def test_blur_and_noise_both_cost_sharpness(videos):
    video = videos["d-32"]
    blurred = np.stack([video[0], *(cv2.GaussianBlur(frame, (0, 0), 2) for frame in video[1:])])
    grain = np.random.default_rng(2).normal(0, 25, video.shape)
    noisy = np.concatenate([video[:1], np.clip(video + grain, 0, 255).astype(np.uint8)[1:]])
    clean = scores.relative_sharpness(video)
    assert scores.relative_sharpness(blurred) < clean - 0.2
    assert scores.relative_sharpness(noisy) < clean - 0.2


def test_fading_colours_are_drift(videos):
    video = videos["d-32"]
    faded = (video * np.linspace(1, 0.5, len(video))[:, None, None, None]).astype(np.uint8)
    assert scores.color_drift(faded[:8], faded[-8:]) > scores.color_drift(video[:8], video[-8:]) + 0.2
    assert scores.sharpness_drift(faded[:8], faded[-8:]) > 0.4
    assert scores.color_drift(video, video) == scores.sharpness_drift(video, video) == 0


def test_the_total_prefers_the_video_that_keeps_to_its_camera(videos, walks):
    walk = walks["d-32"]
    right, wrong = (
        scores.total(scores.score(videos[text], walk.c2w.numpy(), walk.intrinsics.numpy(), walk.fps))
        for text in ("d-32", "a-32")
    )
    assert 0 <= wrong < right <= 1

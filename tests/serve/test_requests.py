"""Whatever strangers send is a video that can be made, or an error that names the field."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.model.camera import parse_actions
from longtake.serve.requests import Limits, Refused, SearchRequest, VideoRequest, Wanted, candidates, checked, parsed

pytestmark = pytest.mark.cpu


@pytest.fixture
def config(small_config):
    return dataclasses.replace(small_config, chunk_causal=True, chunk_window=1, fps=16.0)


@pytest.fixture
def image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(config, upload: bytes | None, refines: bool = True, **given) -> Wanted:
    return checked(parsed(given, VideoRequest), upload, Limits(config, 10.0, refines, 8))


def arrays(wanted: Wanted) -> dict[str, np.ndarray]:
    return dict(np.load(io.BytesIO(wanted.files["path.npz"])))


def test_keys_become_whole_chunks_of_poses_and_the_frames_that_were_asked_for(config, image):
    wanted = ask(config, image, prompt="a hall", actions="w-20", seconds=2)
    assert wanted.frames == 33 and wanted.request["seconds"] == 2
    c2w = arrays(wanted)["c2w"]
    expected = parse_actions("w-20,w-12", config.key_map, 16.0).c2w.numpy()
    assert len(c2w) == 49  # of two chunks
    np.testing.assert_allclose(c2w[:33], expected, atol=1e-5)
    np.testing.assert_array_equal(c2w[33:], c2w[32:33].repeat(16, 0))
    with Image.open(io.BytesIO(wanted.files["image.png"])) as kept:
        assert (kept.height, kept.width) == config.image_size
    assert wanted.request["refine"] and not ask(config, image, refines=False, actions="w-20").request["refine"]


def test_poses_are_seen_from_their_first_and_intrinsics_belong_to_the_image_as_it_was_sent(config, image):
    path = parse_actions("dw-24", "official", 16.0).c2w
    moved = torch.linalg.inv(path[5:6]) @ path
    text = json.dumps(moved.tolist())
    wanted = ask(config, image, poses=text, intrinsics="[60, 60, 50, 25]")
    found = arrays(wanted)
    np.testing.assert_allclose(found["c2w"], path.numpy(), atol=1e-4)
    height, width = config.image_size
    scale = max(height / 50, width / 100)
    np.testing.assert_allclose(found["intrinsics"], [60 * scale, 60 * scale, width / 2, height / 2], rtol=1e-5)


def test_an_image_may_be_in_the_json(config, image):
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    assert ask(config, None, image=url, actions="w-24").files == ask(config, image, actions="w-24").files


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("prompt", {"prompt": "x" * 4001}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": "many"}),
        ("seconds", {"seconds": 0}),
        ("seconds", {"seconds": "NaN"}),
        ("seconds", {"seconds": 11}),
        ("size", {"size": "1x1"}),
        ("model", {"model": "sora-2"}),
        ("actions", {"actions": "fly-3"}),
        ("actions", {"actions": "w-0"}),
        ("actions", {"actions": "w-999999999999"}),
        ("actions", {"actions": None}),
        ("actions", {"poses": [np.eye(4).tolist()] * 9}),
        ("key_map", {"key_map": "mine"}),
        ("poses", {"actions": None, "poses": "[[[["}),
        ("poses", {"actions": None, "poses": "[" * 100_000}),
        ("poses", {"actions": None, "poses": [[[1.0]]]}),
        ("poses", {"actions": None, "poses": [[[1.0]], [[1.0, 2.0]]]}),
        ("poses", {"actions": None, "poses": (2 * np.eye(4)[None].repeat(9, 0)).tolist()}),
        ("poses", {"actions": None, "poses": np.full((9, 4, 4), np.nan).tolist()}),
        ("poses", {"actions": None, "poses": [np.eye(4).tolist()] * 999}),
        ("poses", {"actions": None, "poses": [np.eye(4).tolist()] * 9, "seconds": 2}),
        ("intrinsics", {"intrinsics": [0, 0, 0, 0]}),
        ("intrinsics", {"intrinsics": [1e308, 1e308, 1, 1]}),
        ("intrinsics", {"intrinsics": [1, 2, 3]}),
        ("fov_deg", {"fov_deg": 179}),
        ("colour", {"colour": "red"}),
        ("image", {"image": "$$$"}),
        ("input_reference", {"image": base64.b64encode(b"GIF89a" + bytes(100)).decode()}),
        ("input_reference", {}),
    ],
)
def test_what_is_wrong_is_named(config, image, field, given):
    upload = None if "image" in given or not given else image
    with pytest.raises(Refused) as refused:
        ask(config, upload, **{"actions": "w-24", **given})
    assert refused.value.param == field and 400 <= refused.value.status < 500
    assert field in refused.value.message or field == "model"


def test_damaged_images_are_refused_whatever_their_damage(config, image):
    chance = random.Random(0)
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(image)) as opened:
            opened.save(buffer, kind)
        for _ in range(100):
            data = bytearray(buffer.getvalue())
            for _ in range(chance.randrange(1, 20)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                ask(config, bytes(data[: chance.randrange(1, len(data) + 1)]), actions="w-24")
            except Refused as error:
                assert error.param == "input_reference"
                refused += 1
    assert refused > 100


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(config):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(Refused, match="too many"):
        ask(config, buffer.getvalue(), actions="w-24")


def search(config, upload: bytes, **given) -> tuple[dict, list[Wanted]]:
    return candidates(parsed(given, SearchRequest), upload, Limits(config, 10.0, True, 8))


def test_a_search_is_a_video_for_each_way_and_seed(config, image):
    ways = ["w-24", "d-8,w-16"]
    kept, wanted = search(config, image, prompt="a hall", candidates=json.dumps(ways), seeds="2", seed=5, keep=3)
    assert kept["keep"] == 3 and kept["refine"] and kept["prompt"] == "a hall"
    asked = [
        ask(config, image, prompt="a hall", actions=way, seed=seed, refine=False) for way in ways for seed in (5, 6)
    ]
    assert [each.request for each in wanted] == [each.request for each in asked]
    assert [each.files for each in wanted] == [each.files for each in asked]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "candidates"),
        ({"candidates": []}, "candidates"),
        ({"candidates": "w-24"}, "candidates"),
        ({"candidates": ["w-24", "x!"]}, "candidates"),
        ({"candidates": ["w-24"], "actions": "w-24"}, "actions"),
        ({"candidates": ["w-24"] * 3, "seeds": 3}, "candidates"),
        ({"candidates": ["w-24"], "keep": 2}, "keep"),
        ({"candidates": ["w-24"], "seed": 2**63 - 1, "seeds": 2}, "seed"),
        ({"candidates": ["w-24"], "seconds": 11}, "seconds"),
        ({"candidates": ["w-24"], "scores": {"beauty": 1}}, "scores"),
        ({"candidates": ["w-24"], "scores": '{"follow": 0}'}, "scores"),
    ],
)
def test_a_search_that_cannot_be_names_its_field(config, image, given, param):
    with pytest.raises(Refused) as refused:
        search(config, image, **given)
    assert refused.value.param == param and refused.value.status == 400 and param in refused.value.message

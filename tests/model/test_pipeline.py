import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from longtake.model import presets
from longtake.model.camera import parse_actions
from longtake.model.pipeline import WorldPipeline

pytestmark = pytest.mark.cpu


@pytest.fixture
def pipeline(config, monkeypatch):
    monkeypatch.setitem(presets._PRESETS, "small", config)
    return WorldPipeline.from_config(config)


def camera_of(config, frames=16):
    trajectory = parse_actions(f"w-{frames}", image_size=config.image_size, fov_deg=70)
    return trajectory.features(config.image_size, config.vae_stride)


def generate(pipeline, image, seeds, camera=None):
    camera = camera or camera_of(pipeline.config)
    start = pipeline.encode_image(image).expand(len(seeds), -1, -1, -1, -1)
    text, mask = pipeline.encode_text(["a hall"] * len(seeds))
    return pipeline.rollout(start, text, mask, camera.expand(len(seeds)), seeds)


def test_an_image_becomes_a_video_that_begins_with_it(pipeline):
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    latents = generate(pipeline, image, [3])
    text, mask = pipeline.encode_text(["a hall"])
    refined = pipeline.refine(latents, text, mask, [3])
    video = pipeline.decode(refined)
    assert torch.equal(refined[:, :, :1], pipeline.encode_image(image))
    assert video.shape == (17, 64, 96, 3) and video.dtype == np.uint8


def test_a_clip_does_not_depend_on_its_neighbours(pipeline):
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    both, alone = generate(pipeline, image, [1, 2]), generate(pipeline, image, [2])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_guidance_takes_one_negative_prompt_for_all_clips(config):
    guided = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale=3.0))
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    path = parse_actions("w-16", image_size=config.image_size, fov_deg=70)
    pipeline = WorldPipeline.from_config(guided)
    # Caption and camera begin without effect in random weights.
    for block in pipeline.part("dit").blocks:  # type: ignore[union-attr]
        torch.nn.init.normal_(block.cross_attn.proj.weight)
    both = pipeline.generate([image, image], ["a hall", "a yard"], [path, path], [1, 2])
    alone = pipeline.generate([image], ["a yard"], [path], [2])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    pipeline.config = config
    assert not torch.allclose(pipeline.generate([image], ["a yard"], [path], [2]), alone)


def test_a_video_that_diverges_is_refused(pipeline):
    for block in pipeline.part("dit").blocks:
        torch.nn.init.constant_(block.attn.proj.weight, torch.inf)
    with pytest.raises(ValueError, match="these weights diverge over 3 latent frames: ask for a shorter video"):
        generate(pipeline, np.zeros((64, 96, 3), dtype=np.uint8), [1])


def test_saved_weights_generate_the_same_video(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, torch.float32)
    reloaded = WorldPipeline.from_pretrained("small", tmp_path)
    image = np.full((80, 80, 3), 90, dtype=np.uint8)
    torch.testing.assert_close(generate(reloaded, image, [0]), generate(pipeline, image, [0]))


def test_weights_that_read_less_of_a_camera_generate_without_the_rest(config, monkeypatch, tmp_path):
    """The weights' own configuration says so, not the preset."""
    monkeypatch.setitem(presets._PRESETS, "small", config)
    WorldPipeline.from_config(dataclasses.replace(config, camera_branches="none")).save_pretrained(tmp_path)
    pipeline = WorldPipeline.from_pretrained("small", tmp_path)
    for parameter in pipeline.part("dit").parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    image, paths = np.zeros((64, 96, 3), dtype=np.uint8), [parse_actions(f"{key}-16", fov_deg=70) for key in "ws"]
    ahead, back = (pipeline.generate([image], ["a hall"], [path], [0]) for path in paths)
    assert torch.equal(ahead, back)


def test_images_of_any_shape_are_cropped_to_the_presets(pipeline, tmp_path):
    Image.new("L", (31, 200), 7).save(tmp_path / "grey.png")
    assert pipeline.prepare_image(tmp_path / "grey.png").shape == (64, 96, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_a_file_that_is_no_image_is_refused_by_name(pipeline, tmp_path, content):
    (tmp_path / "holiday.png").write_bytes(content)
    with pytest.raises(ValueError, match="holiday.png"):
        pipeline.prepare_image(tmp_path / "holiday.png")


def test_weights_of_another_preset_are_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'small', not of 'tiny'"):
        WorldPipeline.from_pretrained("tiny", tmp_path)


def test_a_missing_extra_or_misshaped_tensor_is_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "refiner" / "model.safetensors"
    tensors = load_file(file)
    name = "proj_in.weight"
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        (tensors | {"stray": torch.zeros(1)}, "stray does not belong"),
        (tensors | {name: tensors[name][:1].clone()}, f"{name} has shape"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            WorldPipeline.from_pretrained("small", tmp_path, parts=("refiner",))


def test_more_latent_frames_than_positions_are_refused(pipeline, config):
    short = WorldPipeline(dataclasses.replace(config, max_latent_frames=2), pipeline.modules)
    with pytest.raises(ValueError, match="2 positions"):
        generate(short, np.zeros((64, 96, 3), dtype=np.uint8), [0])


def test_a_step_whose_part_was_not_loaded_says_which(config):
    with pytest.raises(ValueError, match="'vae'"):
        WorldPipeline.from_config(config, parts=("text",)).encode_video(np.zeros((1, 64, 96, 3), dtype=np.uint8))

"""Videos made chunk by chunk: the sampler, and the pipeline over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longtake.model import presets
from longtake.model.camera import parse_actions
from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes
from longtake.model.dit.world_model import WorldModel
from longtake.model.pipeline import WorldPipeline
from longtake.model.samplers.chunk_flow import chunk_flow_euler
from longtake.model.samplers.flow_euler import euler, sampler_sigmas
from longtake.model.samplers.self_forcing import self_forcing
from longtake.model.stream import ChunkStream

pytestmark = pytest.mark.cpu

FEW = SamplerConfig(4, 8.0, 1.0, timesteps=(1000, 960, 889, 727, 0), chunk_interval=1)


@pytest.fixture
def streaming(config: WorldModelConfig) -> WorldModelConfig:
    return dataclasses.replace(config, softmax_dtype="float32", chunk_causal=True, chunk_window=1, sampler=FEW)


@pytest.fixture
def pipeline(streaming: WorldModelConfig) -> WorldPipeline:
    pipeline = WorldPipeline.from_config(streaming)
    for parameter in pipeline.modules["dit"].parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return pipeline


def inputs(config: WorldModelConfig, frames: int, clips: int = 1) -> dict:
    generator = torch.Generator().manual_seed(2)
    path = parse_actions(f"w-24,dw-{8 * (frames - 4)}", fps=16, image_size=config.image_size)
    return dict(
        image_latents=torch.randn(clips, config.latent_channels, 1, *config.latent_size, generator=generator),
        text=torch.randn(clips, 5, config.text_dim, generator=generator),
        text_mask=torch.ones(clips, 5),
        camera=path.features(config.image_size, config.vae_stride).expand(clips),
        seeds=list(range(clips)),
    )


class Recomputed:
    """Everything that was kept is computed again in every pass, as the public sampler does."""

    def __init__(self, model: WorldModel, inputs: dict, window: int | None):
        self.model, self.inputs, self.window = model, inputs, window
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        whole = torch.cat([*self.kept, x], 2)
        frames, done = whole.shape[2], whole.shape[2] - x.shape[2]
        timestep = torch.cat([timestep.new_zeros(len(x), done), timestep], 1)
        axis = ChunkCausal([each.shape[2] for each in self.kept] + list(sizes), self.window)
        camera = self.inputs["camera"].frames(0, frames)
        given = self.inputs["text"], self.inputs["text_mask"], camera
        return self.model(whole, timestep, *given, time_axis=axis)[:, :, done:]

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        self.kept.append(x)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("interval", [None, 0.4, 1])
def test_finished_chunks_need_not_be_computed_again(streaming, pipeline, interval, window):
    config = dataclasses.replace(streaming, chunk_window=window)
    pipeline.modules["dit"].config = config  # type: ignore[assignment]
    model, given, sizes = pipeline.modules["dit"], inputs(config, 11), chunk_sizes(11, 3)
    noise = torch.randn(1, config.latent_channels, 11, *config.latent_size).split(sizes, 2)
    sigmas = sampler_sigmas(SamplerConfig(5, 3.0)).tolist()
    networks = ChunkStream(model, given["text"], given["text_mask"], given["camera"]), Recomputed(model, given, window)  # type: ignore[arg-type]
    runs = [
        list(chunk_flow_euler(network, lambda chunk, _: noise[chunk], sizes, sigmas, interval, given["image_latents"]))
        for network in networks
    ]
    for found, true, size in zip(*runs, sizes, strict=True):
        assert found.shape[2] == size
        assert (found - true).norm() < 1e-5 * true.norm()
    assert torch.equal(runs[0][0][:, :, :1], given["image_latents"])


def test_chunks_one_after_another_are_integrated_as_a_clip_is(streaming, pipeline):
    given, sigmas = inputs(streaming, 7), sampler_sigmas(FEW)
    network = ChunkStream(pipeline.modules["dit"], given["text"], given["text_mask"], given["camera"])  # type: ignore[arg-type]
    chunks = list(pipeline.stream(**given))
    assert [chunk.shape[2] for chunk in chunks] == [4, 3]
    network.keep(chunks[0], [4])
    noise = torch.randn(1, streaming.latent_channels, 3, *streaming.latent_size)
    found = euler(lambda x, timestep: network.velocity(x, timestep, [3]), noise, sigmas)
    again = chunk_flow_euler(network, lambda *_: noise, [3], sigmas.tolist(), 1)
    torch.testing.assert_close(next(again), found)


def test_a_chunk_comes_before_it_is_kept_and_the_last_one_is_not():
    class Network:
        def __init__(self):
            self.kept = []

        def velocity(self, x, timestep, sizes):
            return torch.zeros_like(x)

        def keep(self, x, sizes):
            self.kept += sizes

    network, kept = Network(), []
    for _ in chunk_flow_euler(network, lambda _, frames: torch.randn(1, 2, frames, 2, 2), [4, 3, 3], [1, 0.5, 0], 1):
        kept.append(list(network.kept))
    assert kept == [[], [4], [4, 3]] and network.kept == [4, 3]


def test_fresh_noise_makes_what_training_rolled_out(streaming, pipeline):
    given, noise = inputs(streaming, 7), torch.randn(2, 4, 1, streaming.latent_channels, 4, *streaming.latent_size)
    sigmas = sampler_sigmas(FEW).tolist()

    def network() -> ChunkStream:
        return ChunkStream(pipeline.modules["dit"], given["text"], given["text_mask"], given["camera"])  # type: ignore[arg-type]

    def fresh(chunk: int, frames: int, step: int = 0) -> Tensor:
        return noise[chunk, step][:, :, :frames]

    image = given["image_latents"]
    found = torch.cat(list(chunk_flow_euler(network(), fresh, [4, 3], sigmas, 1, image, fresh)), 2)
    in_turn = (fresh(chunk, size, step) for chunk, size in enumerate([4, 3]) for step in range(4))
    with torch.no_grad():
        true = self_forcing(network(), lambda _: next(in_turn), [4, 3], sigmas[:-1], 3, image)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    other = torch.cat(list(chunk_flow_euler(network(), fresh, [4, 3], sigmas, 1, image)), 2)
    assert (found - other).abs().max() > 0.1


def test_a_longer_video_begins_alike_and_clips_do_not_see_each_other(streaming, pipeline):
    short = pipeline.rollout(**inputs(streaming, 7))
    long = pipeline.rollout(**inputs(streaming, 10))
    torch.testing.assert_close(long[:, :, :7], short)
    two = pipeline.rollout(**inputs(streaming, 7, clips=2))
    alone = {key: value[1:] if key != "camera" else value.expand(2) for key, value in inputs(streaming, 7, 2).items()}
    alone["camera"] = inputs(streaming, 7)["camera"]
    torch.testing.assert_close(two[1:], pipeline.rollout(**alone), rtol=1e-4, atol=1e-5)
    assert (two[0] - two[1])[:, 1:].abs().mean() > 0.1


def test_guidance_keeps_a_past_of_both_texts(streaming, pipeline):
    given = inputs(streaming, 7)
    negative = torch.zeros_like(given["text"]), given["text_mask"]
    plain = pipeline.rollout(**given)

    def guided(scale: float, text: tuple) -> Tensor:
        sampler = dataclasses.replace(FEW, guidance_scale=scale)
        pipeline.config = pipeline.modules["dit"].config = dataclasses.replace(streaming, sampler=sampler)  # type: ignore[assignment]
        return pipeline.rollout(**given, negative=text)

    torch.testing.assert_close(guided(3.0, (given["text"], given["text_mask"])), plain, rtol=1e-4, atol=1e-5)
    assert (guided(3.0, negative) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs the features of a negative prompt"):
        pipeline.rollout(**given)


def test_progress_counts_chunks(streaming, pipeline):
    seen = []
    pipeline.rollout(**inputs(streaming, 8), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_what_weights_were_not_made_for_is_refused(config, streaming, pipeline):
    given = inputs(streaming, 7)
    with pytest.raises(ValueError, match="distilled to 4 steps, they make nothing in 60"):
        pipeline.rollout(**given, num_steps=60)
    with pytest.raises(ValueError, match="more than the 1024 positions"):
        everything = WorldPipeline(dataclasses.replace(streaming, chunk_window=None), pipeline.modules)
        next(everything.stream(**given | {"camera": None, "num_latent_frames": 2000}))
    with pytest.raises(ValueError, match="see the whole clip at once"):
        next(WorldPipeline.from_config(config, parts=()).stream(**given))
    short = ChunkStream(pipeline.modules["dit"], given["text"], given["text_mask"], given["camera"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the camera has 7 latent frames, 9 are needed"):
        short.velocity(torch.zeros(1, streaming.latent_channels, 9, *streaming.latent_size), torch.zeros(1, 9), [9])
    for wrong, message in (
        (dict(timesteps=(1000, 1000, 0), num_steps=2), "must fall from at most 1000 to 0"),
        (dict(timesteps=(1000, 500), num_steps=1), "must fall from at most 1000 to 0"),
        (dict(timesteps=(1000, 0), num_steps=4), "num_steps is 4, but timesteps"),
        (dict(chunk_interval=0), "it must be more than 0 and at most 1"),
        (dict(fresh_noise=True), "is for weights distilled to few steps"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplerConfig(**wrong)  # type: ignore[arg-type]


def test_the_streaming_preset_is_bound_to_its_sampler():
    config = presets.get("sana-wm-streaming")
    assert config.chunk_causal and config.chunk_window == 1 and config.vae == {"decoder_causal": True}
    assert sampler_sigmas(config.sampler).tolist() == pytest.approx([1, 0.96, 0.889, 0.727, 0])

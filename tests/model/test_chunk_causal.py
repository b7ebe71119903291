"""The chunk-causal network: what it sees, and that a stream of chunks is the clip that they make."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from longtake.kernels.gdn import reference
from longtake.model import presets
from longtake.model.camera import CameraFeatures, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes
from longtake.model.dit.world_model import WorldModel
from longtake.model.state import StreamState

pytestmark = pytest.mark.cpu

AREA = (2, 3)


@pytest.fixture
def exact(config: WorldModelConfig) -> WorldModelConfig:
    return dataclasses.replace(config, softmax_dtype="float32")


def network(config: WorldModelConfig) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(config)
    for parameter in model.parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def clip(config: WorldModelConfig, frames: int) -> dict:
    torch.manual_seed(1)
    stride = config.vae_stride
    size = AREA[0] * stride[1], AREA[1] * stride[2]
    path = parse_actions(f"w-{4 * (frames - 1)},dw-{4 * (frames - 1)}", fps=16, image_size=size)
    return dict(
        latents=torch.randn(1, config.latent_channels, frames, *AREA),
        timestep=1000 * torch.rand(1, frames),
        text=torch.randn(1, 5, config.text_dim),
        text_mask=torch.ones(1, 5),
        camera=path.features(size, stride),
    )


def frames_of(clip: dict, first: int, count: int) -> dict:
    here, camera = slice(first, first + count), clip["camera"]
    part = CameraFeatures(camera.conditions[:, here], camera.plucker[:, :, here])
    return clip | dict(latents=clip["latents"][:, :, here], timestep=clip["timestep"][:, here], camera=part)


def streamed(model: WorldModel, clip: dict, sizes: list[int], window: int | None) -> tuple[list[Tensor], StreamState]:
    state, velocities = StreamState(), []
    for size in sizes:
        axis = ChunkCausal([size], window, state, model.rotary, keep=True)
        velocities.append(model(**frames_of(clip, state.frames, size), time_axis=axis))
        state = axis.after()
    return velocities, state


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("frames", [11, 12])
@torch.no_grad()
def test_a_stream_of_chunks_is_the_clip_that_they_make(exact, frames, window):
    model, whole = network(exact), clip(exact, frames)
    sizes = chunk_sizes(frames, 3)
    true = model(**whole, time_axis=ChunkCausal(sizes, window))
    chunks, state = streamed(model, whole, sizes, window)
    for found, part in zip(chunks, true.split(sizes, 2), strict=True):
        assert error(found, part) < 1e-5
    assert state.frames == frames and state.chunks == len(sizes)
    assert [chunk for chunk, *_ in state.kept] == ([0, len(sizes) - 1] if window else list(range(len(sizes))))
    # Several chunks may follow several.
    first = ChunkCausal(sizes[:2], window, keep=True)
    model(**frames_of(whole, 0, sum(sizes[:2])), time_axis=first)
    second = ChunkCausal(sizes[2:], window, first.after(), model.rotary, keep=True)
    rest = model(**frames_of(whole, sum(sizes[:2]), sum(sizes[2:])), time_axis=second)
    assert error(rest, true[:, :, sum(sizes[:2]) :]) < 1e-5
    kept = second.after().kept
    assert [each[:2] for each in kept] == [each[:2] for each in state.kept]
    found = second.after().traces
    assert found.keys() == state.traces.keys() and len(found) > 2 * exact.depth


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (presets.get("tiny"), 30),
        (dataclasses.replace(presets.get("sana-wm"), depth=4, softmax_dtype="float32"), 8),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
@torch.no_grad()
def test_many_chunks_at_the_widths_of_the_presets(config, count):
    frames = 1 + config.chunk_size * count
    model, whole = network(config), clip(config, frames)
    sizes = chunk_sizes(frames, config.chunk_size)
    true = model(**whole, time_axis=ChunkCausal(sizes, 1)).split(sizes, 2)
    chunks, state = streamed(model, whole, sizes, 1)
    assert len(chunks) == count
    assert max(error(*pair) for pair in zip(chunks, true, strict=True)) < 1e-5
    # Memory does not grow.
    _, early = streamed(model, whole, sizes[:2], 1)
    assert state.nbytes == early.nbytes > 0


@torch.no_grad()
def test_a_stream_may_go_on_past_the_positions_that_the_network_knows(exact):
    """As long as its first chunk is no further than the last of them, it is as a network with more positions has it;
    then the first chunk stays where it is.
    """
    sizes = [3] * 6
    whole = clip(exact, sum(sizes))
    chunks = [
        streamed(network(dataclasses.replace(exact, max_latent_frames=most)), whole, sizes, 1)[0] for most in (99, 15)
    ]
    same = [torch.equal(*pair) for pair in zip(*chunks, strict=True)]
    assert same == [True] * 5 + [False]  # the sixth's last frame is 17 after the first
    assert all(chunk.isfinite().all() for chunk in chunks[1])


@torch.no_grad()
def test_a_chunk_sees_its_own_future_and_no_other(exact):
    model, whole = network(exact), clip(exact, 10)
    sizes = chunk_sizes(10, 3)  # 4, 3, 3
    before = model(**whole, time_axis=ChunkCausal(sizes))
    changed = dict(whole, latents=whole["latents"].clone())
    changed["latents"][:, :, 6] += 1  # the last frame of the second chunk
    after = model(**changed, time_axis=ChunkCausal(sizes))
    moved = (after - before).abs().amax((0, 1, 3, 4))
    assert torch.equal(moved[:4], torch.zeros(4)) and (moved[4:] > 1e-4).all()


@torch.no_grad()
def test_softmax_sees_the_first_chunk_and_the_window(exact):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 10, 3, 8) for _ in range(3))  # a token a frame
    for window, hidden in ((1, 0), (0, 3)):
        out = ChunkCausal([4, 3, 3], window).attend(q, k, v, 0.3, torch.float32)
        seen = [*range(4), *range(4 + hidden, 10)]
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, 7:], k[:, seen]) * 0.3
        true = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, seen])
        torch.testing.assert_close(out[:, 7:], true)


def test_gradients_of_a_clip_of_one_chunk_are_those_of_the_clip(exact):
    """A single chunk has no past and no zeros after it but the clip's own."""
    found = []
    for axis in (None, ChunkCausal([5])):
        model, whole = network(exact), clip(exact, 5)
        velocity = model(**whole, **({} if axis is None else {"time_axis": axis}))
        velocity.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(error(*pair) < 1e-5 or float(pair[0].norm()) < 1e-7 for pair in zip(*found, strict=True))


def test_gradients_reach_earlier_chunks_and_the_state_that_a_scan_starts_from():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 7, 4, 2, 6).mul(0.3).unbind()
    maps = reference.frame_maps(k, v, torch.rand(1, 7, 4, 2), torch.rand(1, 7, 2))
    transition, increment = (x.requires_grad_() for x in maps)
    state = torch.randn(1, 2, 6, 6, requires_grad=True)
    whole = reference.bidirectional_states(transition[:, :4], increment[:, :4], state)
    rest = reference.bidirectional_states(transition[:, 4:], increment[:, 4:], whole[:, -1])
    weights = torch.randn(1, 7, 2, 6, 6)
    true = torch.autograd.grad((torch.cat([whole, rest], 1) * weights).sum(), (transition, increment, state))
    past = StreamState(2, 1, traces={(0, "mass"): (state,)})
    found = ChunkCausal([4, 3], past=past).states(transition, increment, "mass")
    gradients = torch.autograd.grad((found * weights).sum(), (transition, increment, state))
    for pair in zip(gradients, true, strict=True):
        torch.testing.assert_close(*pair)


def test_chunks_are_of_one_size_but_the_first():
    assert chunk_sizes(121, 3) == [4] + [3] * 39
    assert [chunk_sizes(frames, 3) for frames in (1, 3, 5, 6)] == [[1], [3], [5], [3, 3]]
    with pytest.raises(ValueError, match="0 latent frames cannot be cut into chunks of 3"):
        chunk_sizes(0, 3)


def test_what_a_stream_cannot_do_is_refused(exact):
    model, whole = network(exact), clip(exact, 3)
    with pytest.raises(ValueError, match="reads padding as if it were real"):
        model(**whole, time_axis=ChunkCausal([3]), frames=torch.tensor([2]))

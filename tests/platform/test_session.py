"""Sessions: what one makes is what a rollout makes, and nothing but a chunk that succeeded changes one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.model.camera import Steering, parse_actions
from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.platform.engine import Chunk, Session, SessionStopped, Step, step_together

pytestmark = pytest.mark.cpu

FEW = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1)


def build(config: WorldModelConfig) -> WorldPipeline:
    pipeline = WorldPipeline.from_config(config)
    for parameter in pipeline.modules["dit"].parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return pipeline


@pytest.fixture
def streaming(small_config: WorldModelConfig) -> WorldModelConfig:
    return dataclasses.replace(
        small_config, softmax_dtype="float32", chunk_causal=True, chunk_window=1, sampler=FEW, fps=16.0
    )


@pytest.fixture
def pipeline(streaming: WorldModelConfig) -> WorldPipeline:
    return build(streaming)


@pytest.fixture
def image(streaming: WorldModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*streaming.image_size, 3), dtype=np.uint8)


def same(one, other) -> bool:
    return torch.equal(one.latents, other.latents) and np.array_equal(one.frames, other.frames)


def chunks_of(sessions: list[Session], actions: list[str]) -> list[Chunk]:
    made = step_together([Step(session, action) for session, action in zip(sessions, actions, strict=True)])
    return [chunk for chunk in made if isinstance(chunk, Chunk)]


def test_a_session_makes_what_a_rollout_of_its_path_makes(pipeline, image):
    session = Session(pipeline, image, "a hall", seed=5)
    steps = ["w-24", "dw-16", "s-10,jw-14"]
    chunks = [session.step(actions) for actions in steps]
    assert [chunk.actions for chunk in chunks] == ["w-24", "dw-16,none-8", "s-10,jw-14"]
    assert [chunk.number for chunk in chunks] == [0, 1, 2] and session.frames == 73
    path = parse_actions("w-24,dw-16,none-8,s-10,jw-14", image_size=pipeline.config.image_size)
    torch.testing.assert_close(torch.cat([chunk.c2w for chunk in chunks]), path.c2w)
    true = pipeline.generate([image], ["a hall"], [path], seeds=[5])
    torch.testing.assert_close(torch.cat([chunk.latents for chunk in chunks], 2), true, rtol=1e-4, atol=1e-5)
    frames = np.concatenate([chunk.frames for chunk in chunks]).astype(int)
    assert frames.shape[0] == 73 and abs(frames - pipeline.decode(true)).max() <= 1


def test_a_clone_goes_on_by_itself_and_a_reset_begins_again(pipeline, image):
    session = Session(pipeline, image)
    first = session.step("w-24")
    other = session.clone()
    left, right = session.step("a-24"), other.step("d-24")
    assert not same(left, right)
    assert same(other.clone().step("w-8"), other.step("w-8"))
    session.reset()
    assert session.frames == 0 and same(session.step("w-24"), first)
    assert same(session.step("a-24"), left)
    assert not same(Session(pipeline, image, seed=1).step("w-24"), first)


def test_a_chunk_that_fails_or_is_stopped_leaves_no_trace(pipeline, image, monkeypatch):
    session = Session(pipeline, image)
    session.step("w-24")
    truth = session.clone().step("d-24")
    asked = iter([False, True])
    with pytest.raises(SessionStopped, match="chunk 1 was stopped"):
        session.step("a-24", stop=lambda: next(asked))
    with pytest.raises(ValueError, match="25 frames of actions are more than a chunk's 24"):
        session.step("w-25")
    with pytest.raises(ValueError, match="unknown keys x"):
        session.step("x-2")
    with monkeypatch.context() as patch:
        patch.setattr("longtake.platform.engine.session.decode_more", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step("a-24")
    assert session.frames == 25 and same(session.step("d-24"), truth)


def test_what_a_session_keeps_does_not_grow(pipeline, image):
    session = Session(pipeline, image)
    sizes = []
    for _ in range(4):
        session.step("w-24")
        sizes.append(session.nbytes)
    assert sizes[1] == sizes[2] == sizes[3] > 0


@pytest.mark.parametrize("sampler", [dict(fresh_noise=True), dict(guidance_scale=3.0)], ids=str)
def test_sessions_step_together_as_alone(streaming, image, sampler):
    """Of unlike captions, seeds, actions, and places in their videos."""
    config = dataclasses.replace(streaming, sampler=dataclasses.replace(FEW, **sampler))
    pipeline = build(config)
    sessions = [Session(pipeline, image, caption, seed) for caption, seed in (("a hall", 0), ("outdoors", 1), ("", 2))]
    for session, chunk in zip(sessions, chunks_of(sessions, ["w-24"] * 3), strict=True):
        alone = Session(pipeline, image, ["a hall", "outdoors", ""][sessions.index(session)], session._seed).step(
            "w-24"
        )
        torch.testing.assert_close(chunk.latents, alone.latents, rtol=1e-4, atol=1e-5)
    for session, count in zip(sessions, (1, 3, 5), strict=True):
        for _ in range(count):
            session.step("dw-24")
    assert len({session.place() for session in sessions}) == 1 and len({session.frames for session in sessions}) == 3
    clones = [session.clone() for session in sessions]
    for actions in (["a-24", "d-8", ""], ["w-24"] * 3):
        made = chunks_of(sessions, actions)
        for chunk, clone, action, session in zip(made, clones, actions, sessions, strict=True):
            alone = clone.step(action)
            torch.testing.assert_close(chunk.latents, alone.latents, rtol=1e-4, atol=1e-4)
            assert (chunk.number, chunk.actions) == (alone.number, alone.actions) and session.frames == clone.frames
            assert torch.equal(chunk.c2w, alone.c2w) and session.nbytes == clone.nbytes


def test_a_session_follows_poses_as_it_follows_keys(pipeline, image):
    led, given = (Session(pipeline, image, "a hall", seed=5) for _ in range(2))
    for actions in ("w-24", "dw-16"):
        chunk = led.step(actions)
        poses = chunk.c2w[-given.actions_per_chunk :]
        assert same(chunk, given.step(poses))
    with pytest.raises(ValueError, match=r"are \(24, 4, 4\), not \(5, 4, 4\)"):
        given.step(poses[:5])
    with pytest.raises(ValueError, match="finite"):
        given.step(torch.full_like(poses, torch.nan))


def test_a_session_made_again_from_its_latents_goes_on_the_same(pipeline, image):
    """Text that somebody else has read, chunks that were made before, and no decoder."""
    steps = ["w-24", "dw-16", "aw-24"]
    first = Session(pipeline, image, "a hall", seed=5)
    chunks = [first.step(actions) for actions in steps]
    text = pipeline.encode_text(["a hall"])
    again = Session(pipeline, image, seed=5, text=text, decode=False)
    for actions, chunk in zip(steps[:2], chunks, strict=False):
        kept = again.step(actions, known=chunk.latents)
        assert torch.equal(kept.latents, chunk.latents) and len(kept.frames) == 0
    again = Session.restore(pipeline, again.snapshot())
    last = again.step(steps[2])
    assert torch.equal(last.latents, chunks[2].latents) and len(last.frames) == 0
    torch.testing.assert_close(last.c2w, chunks[2].c2w)
    with pytest.raises(ValueError, match="known latents have shape"):
        again.step(known=chunks[0].latents)
    fresh = Session(pipeline, image, seed=5)
    known, made = step_together(
        [Step(fresh, steps[0], known=chunks[0].latents), Step(Session(pipeline, image, "a hall", seed=5), steps[0])]
    )
    assert isinstance(known, Chunk) and isinstance(made, Chunk) and same(known, chunks[0]) and same(made, chunks[0])


def test_what_goes_wrong_with_one_leaves_the_others(pipeline, image):
    sessions = [Session(pipeline, image, seed=seed) for seed in range(4)]
    asked = iter([False, True])
    wrong, stopped, right, last = step_together(
        [
            Step(sessions[0], "x-2"),
            Step(sessions[1], "", lambda: next(asked)),
            Step(sessions[2], "w-24"),
            Step(sessions[3]),
        ]
    )
    assert isinstance(wrong, ValueError) and isinstance(stopped, SessionStopped)
    assert isinstance(right, Chunk) and isinstance(last, Chunk) and last.number == 0
    assert [session.frames for session in sessions] == [0, 0, 25, 25]
    torch.testing.assert_close(
        right.latents, Session(pipeline, image, seed=2).step("w-24").latents, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="give each once"):
        step_together([Step(sessions[0]), Step(sessions[0])])
    with pytest.raises(ValueError, match="unlike places"):
        step_together([Step(sessions[0]), Step(sessions[2])])
    assert all(
        isinstance(each, SessionStopped) for each in step_together([Step(s, "", lambda: True) for s in sessions[:2]])
    )


def test_a_session_whose_window_is_bounded_never_ends(streaming, image):
    session = Session(build(dataclasses.replace(streaming, max_latent_frames=7)), image)
    chunks = [session.step("w-24") for _ in range(5)]  # 16 latent frames
    assert session.frames == 121 and all(chunk.latents.isfinite().all() for chunk in chunks)


def test_a_snapshot_goes_on_in_another_process_bit_for_bit(pipeline, image, streaming, tmp_path):
    pipeline.save_pretrained(tmp_path / "weights", torch.float32)
    Image.fromarray(image).save(tmp_path / "image.png")
    session = Session(pipeline, image, "a hall", seed=3, steering=Steering(translation_speed=2.0))
    session.step("w-24")
    session.step("dw-24")
    (tmp_path / "session").write_bytes(session.snapshot())
    program = (
        "import sys, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from longtake.model import weights\n"
        "from longtake.model.parts import build\nfrom longtake.model.pipeline import WorldPipeline\n"
        "from longtake.platform.engine import Session\n"
        "torch.set_num_threads(2)\n"
        "folder = Path(sys.argv[1])\n"
        "import json\n"
        "config = weights.config_from_dict(json.loads((folder / 'weights/config.json').read_text()))\n"
        "modules = {part: weights.load_part(build(part, config), folder / 'weights', part)\n"
        "           for part in ('text', 'vae', 'dit')}\n"
        "session = Session.restore(WorldPipeline(config, modules), (folder / 'session').read_bytes())\n"
        "chunk = session.step('aw-24')\n"
        "np.savez(folder / 'chunk.npz', latents=chunk.latents, frames=chunk.frames, c2w=chunk.c2w)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, true = np.load(tmp_path / "chunk.npz"), session.step("aw-24")
    assert np.array_equal(found["latents"], true.latents) and np.array_equal(found["frames"], true.frames)
    assert np.array_equal(found["c2w"], true.c2w)


def test_what_cannot_go_on_is_refused(pipeline, image, streaming, small_config):
    with pytest.raises(ValueError, match="see the whole clip at once: use chunk-causal ones"):
        Session(WorldPipeline.from_config(small_config, parts=()), image)
    with pytest.raises(ValueError, match="loaded without 'vae'"):
        Session(WorldPipeline.from_config(streaming, parts=("text", "dit")), image)
    with pytest.raises(ValueError, match="needs one with decoder_causal=True"):
        whole = dataclasses.replace(streaming, vae=streaming.vae | {"decoder_causal": False})
        Session(WorldPipeline.from_config(whole), image)
    data = Session(pipeline, image).snapshot()
    for wrong in (b"", data[:100], b"x" * 1000):
        with pytest.raises(ValueError, match="this is not the snapshot of a session"):
            Session.restore(pipeline, wrong)
    other = dataclasses.replace(streaming, chunk_window=2)
    with pytest.raises(ValueError, match="of a session of other weights than these of 'small'"):
        Session.restore(build(other), data)
    short = build(dataclasses.replace(streaming, max_latent_frames=5, chunk_window=None))
    session = Session(short, image)
    session.step("w-24")
    with pytest.raises(ValueError, match="knows 5 latent frames, and the session has had 4: reset it"):
        session.step("w-24")

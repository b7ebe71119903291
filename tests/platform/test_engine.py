"""Many sessions on one model: who is admitted, and who is stepped with whom."""

from __future__ import annotations

import dataclasses
import gc
import threading

import numpy as np
import pytest
import torch

from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.platform.engine import Engine, EngineFull, Session, SessionStopped, engine

pytestmark = pytest.mark.cpu

FEW = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1)


@pytest.fixture(scope="module")
def config(small_config: WorldModelConfig) -> WorldModelConfig:
    few = dict(chunk_causal=True, chunk_window=1, sampler=FEW)
    return dataclasses.replace(small_config, softmax_dtype="float32", **few)


@pytest.fixture(scope="module")
def pipeline(config: WorldModelConfig) -> WorldPipeline:
    return WorldPipeline.from_config(config)


@pytest.fixture
def image(config: WorldModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*config.image_size, 3), dtype=np.uint8)


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many sessions were stepped together, each time since the engine was made."""
    sizes: list[int] = []
    together = engine.step_together

    def noted(steps):
        sizes.append(len(steps))
        return together(steps)

    monkeypatch.setattr(engine, "step_together", noted)
    return sizes


def test_steps_that_wait_together_are_made_together(pipeline, image, batches):
    served = Engine(pipeline, memory=1 << 30, most_together=3)
    sessions = [served.open(image, seed=seed) for seed in range(4)]
    batches.clear()
    held, go = threading.Event(), threading.Event()

    def hold() -> bool:
        held.set()
        go.wait()
        return False

    first = served.submit(sessions[0], "w-24", hold)
    held.wait()  # while this is made, the others wait
    rest = [served.submit(session, "d-24") for session in (sessions[1], sessions[1], *sessions[2:])]
    go.set()
    chunks = [promise.result() for promise in (first, *rest)]
    assert batches == [1, 3, 1]  # a session's second chunk comes after its first
    assert [chunk.number for chunk in chunks] == [0, 0, 1, 0, 0]
    alone = Session(pipeline, image, seed=3).step("d-24")
    torch.testing.assert_close(chunks[4].latents, alone.latents, rtol=1e-4, atol=1e-5)
    served.close()


def test_sessions_of_unlike_places_are_made_one_after_another(pipeline, image, batches):
    served = Engine(pipeline, memory=1 << 30)
    old, new = served.open(image), served.open(image)
    served.step(old)
    batches.clear()
    held, go = threading.Event(), threading.Event()
    blocker = served.open(image)
    first = served.submit(blocker, "", lambda: bool(held.set()) or not go.wait())
    held.wait()
    promises = [served.submit(session) for session in (old, new)]
    go.set()
    assert [promise.result().number for promise in promises] == [1, 0] and first.result().number == 0
    assert batches == [1, 1, 1]
    served.close()


def test_a_session_too_many_is_refused_until_another_is_closed_or_forgotten(pipeline, image):
    one = Engine(pipeline, memory=1 << 30, most_together=1).session_bytes
    session = Session(pipeline, image)
    for _ in range(5):
        session.step()
    assert session.nbytes == one > 0
    served = Engine(pipeline, memory=int(2.5 * one), most_together=1)
    first, second = served.open(image), served.open(image)
    assert served.capacity == 2 == served.open_sessions
    for another in (lambda: served.open(image), lambda: served.clone(first), lambda: served.restore(first.snapshot())):
        with pytest.raises(EngineFull, match="2 sessions of .* MB are open, and .* MB hold no more: close one"):
            another()
    served.close_session(first)
    third = served.clone(second)
    with pytest.raises(ValueError, match="not one of the engine's open ones"):
        served.step(first)
    del third
    gc.collect()
    assert served.restore(second.snapshot()).frames == 0
    served.close()
    with pytest.raises(EngineFull, match="closed"):
        served.open(image)


def test_what_a_step_would_raise_is_raised_to_who_asked(pipeline, image, monkeypatch):
    served = Engine(pipeline, memory=1 << 30, most_together=2)
    session = served.open(image)
    with pytest.raises(ValueError, match="unknown keys x"):
        served.step(session, "x-4")
    with pytest.raises(SessionStopped):
        served.step(session, "", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step_together", lambda steps: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served.step(session)
    assert session.frames == 0 and served.step(session).number == 0
    served.close()


def test_a_model_whose_sessions_grow_is_refused(config):
    whole = WorldPipeline.from_config(dataclasses.replace(config, chunk_window=None))
    with pytest.raises(ValueError, match="set chunk_window"):
        Engine(whole)
    with pytest.raises(ValueError, match="most_together is 0"):
        Engine(whole, most_together=0)

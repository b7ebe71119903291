"""Few-step distillation: the rollout that is trained, and what the generator and its critic learn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal
from longtake.model.dit.world_model import WorldModel
from longtake.model.objectives import Draws
from longtake.model.objectives.distill import DistillObjective, Scorer
from longtake.model.objectives.ode import ODEObjective
from longtake.model.samplers.flow_euler import schedule, trajectory_sigmas
from longtake.model.samplers.self_forcing import self_forcing
from longtake.model.stream import ChunkStream
from longtake.model.text import tokenize

pytestmark = pytest.mark.cpu

FEW = SamplerConfig(4, 8.0, 1.0, timesteps=(1000, 960, 889, 727, 0), chunk_interval=1)
FRAMES, SIZES = 7, [3, 2, 2]


@pytest.fixture
def streaming(config: WorldModelConfig) -> WorldModelConfig:
    few = dict(chunk_causal=True, chunk_window=1, chunk_size=2, sampler=FEW)
    return dataclasses.replace(config, softmax_dtype="float32", **few)


def batch_of(config: WorldModelConfig, clips: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    raw = 8 * (FRAMES - 1) + 1
    ids, mask = tokenize(["a hall", "outdoors"][:clips], config.text.length)
    poses = torch.eye(4).repeat(clips, raw, 1, 1)
    poses[..., 2, 3] = torch.linspace(0, 3, raw)
    return {
        "latents": torch.randn(clips, config.latent_channels, FRAMES, *config.latent_size),
        "noisy": torch.randn(clips, 4, config.latent_channels, FRAMES, *config.latent_size),
        "c2w": poses,
        "intrinsics": torch.tensor([60.0, 60.0, 48.0, 32.0]).repeat(clips, raw, 1),
        "tokens": ids,
        "tokens_mask": mask,
    }


def shaken(module: torch.nn.Module, seed: int = 1) -> None:
    """What starts at zero would hide its inputs."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


class Knowing:
    """A network that knows what is clean, and notes what it is asked."""

    def __init__(self, target: Tensor):
        self.target, self.done = target, 0
        self.asked: list[tuple[str, float]] = []
        self.weight = torch.ones((), requires_grad=True)

    def _velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int], what: str) -> Tensor:
        (size,) = sizes
        assert (timestep[:, 0] == 0).all() == (self.done == 0)
        self.asked.append((what, float(timestep[0, -1])))
        sigma = (timestep / 1000).clamp(min=1e-9)[:, None, :, None, None]
        return (x - self.weight * self.target[:, :, self.done : self.done + size]) / sigma

    def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self._velocity(x, timestep, sizes, "velocity")

    def trained_velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._velocity(x, timestep, sizes, "trained")

    def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
        assert not x.requires_grad
        torch.testing.assert_close(x, self.target[:, :, self.done : self.done + sizes[0]])
        self.done += sizes[0]


@pytest.mark.parametrize("last", range(4))
def test_a_rollout_leaves_after_the_last_step_and_has_its_gradient_alone(last: int):
    target = torch.randn(2, 3, FRAMES, 2, 3)
    network, sigmas = Knowing(target), [t / 1000 for t in FEW.timesteps[:-1]]
    made = self_forcing(network, lambda n: torch.randn(2, 3, n, 2, 3), SIZES, sigmas, last, target[:, :, :1])
    torch.testing.assert_close(made, target)
    passes = [("velocity", 1000 * sigma) for sigma in sigmas[:last]] + [("trained", 1000 * sigmas[last])]
    assert network.asked == [(what, pytest.approx(t)) for what, t in passes * len(SIZES)]
    made[:, :, 1:].sum().backward()
    torch.testing.assert_close(network.weight.grad, target[:, :, 1:].sum())  # none of the image


def test_between_steps_the_noise_is_fresh():
    """Of a network that says the same of any input, what it is given next is that with new noise."""
    given: list[float] = []

    class Constant:
        def velocity(self, x: Tensor, timestep: Tensor, sizes: Sequence[int]) -> Tensor:
            given.append(float(x))
            return (x - 8) / (timestep[:, None, :, None, None] / 1000)

        trained_velocity = velocity

        def keep(self, x: Tensor, sizes: Sequence[int]) -> None:
            pass

    noises = iter(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1, 1))
    self_forcing(Constant(), lambda n: next(noises), [1], [1.0, 0.5, 0.25], 2, torch.zeros(1, 1, 0, 1, 1))
    assert given == [1, 0.5 * 8 + 0.5 * 2, 0.75 * 8 + 0.25 * 3]


def test_a_pass_with_gradients_gives_the_numbers_of_one_without(streaming: WorldModelConfig):
    model, batch = WorldModel(streaming), batch_of(streaming)
    shaken(model)
    objective = ODEObjective(streaming)
    text = torch.randn(2, streaming.text.length, streaming.text_dim), batch["tokens_mask"]
    network = ChunkStream(model, *text, objective.camera(batch))
    x, first = batch["latents"], 0
    for size in SIZES:
        chunk = x[:, :, first : first + size]
        timestep = torch.full((2, size), 500.0)
        with_gradients = network.trained_velocity(chunk, timestep, [size])
        torch.testing.assert_close(network.velocity(chunk, timestep, [size]), with_gradients, rtol=1e-5, atol=1e-6)
        network.keep(chunk, [size])
        first += size
    with_gradients.sum().backward()
    unused = {"y_embedder.y_embedding", "raymap_embedder", "null"}
    missing = [n for n, p in model.named_parameters() if p.grad is None and not any(n.startswith(u) for u in unused)]
    assert all("gate_proj" in n or "beta_proj" in n or n.endswith(("A_log", "dt_bias")) for n in missing), missing


def test_the_first_lesson_is_the_error_of_the_trajectory_s_end(streaming: WorldModelConfig):
    """A network of zero velocity takes what it is given for clean."""
    objective, batch = ODEObjective(streaming, caption_dropout=0.0), batch_of(streaming)
    torch.nn.init.zeros_(objective.world_model.final_layer.linear.weight)
    torch.nn.init.zeros_(objective.world_model.final_layer.linear.bias)
    loss, _ = objective(batch, Draws(0, range(2)))
    chosen = (Draws(0, range(2)).uniform(len(SIZES)) * 5).long()
    of_clips = []
    for clip in range(2):
        first, errors = 0, []
        for chunk, size in enumerate(SIZES):
            frames = slice(max(1, first), first + size)
            if chosen[clip, chunk] < 4:  # at the end there is nothing to learn
                given = batch["noisy"][clip, chosen[clip, chunk], :, frames]
                errors.append((given - batch["latents"][clip, :, frames]).square().mean((0, 2, 3)))
            first += size
        of_clips.append(torch.cat(errors).mean())
    torch.testing.assert_close(loss, torch.stack(of_clips).mean())
    assert len(chosen.unique()) > 1


def test_chunks_before_the_one_that_is_learnt_are_clean_as_the_sampler_s(streaming: WorldModelConfig):
    objective, clips, chunks = ODEObjective(streaming, clean_history=1.0), 400, 5
    chosen = objective._chosen(chunks, 4, Draws(0, range(clips)))
    clean = (chosen == 4).float().mean(0)
    # Chunk n is clean in the clips that begin after it, and else as one of five.
    expected = [(chunks - 1 - n) / chunks + (n + 1) / chunks / 5 for n in range(chunks)]
    torch.testing.assert_close(clean, torch.tensor(expected), atol=0.08, rtol=0)
    (alone,) = ODEObjective(streaming)._chosen(chunks, 4, Draws(0, range(clips))).float().mean(0).mean()[None]
    assert abs(alone - 2) < 0.1


def test_the_first_lesson_sees_what_the_sampler_will(streaming: WorldModelConfig):
    """The timestep of each chunk, and the chunks that its attention may see."""
    objective, batch = ODEObjective(streaming), batch_of(streaming)
    asked: list[tuple] = []

    def note(latents: Tensor, timestep: Tensor, *others: object) -> Tensor:
        asked.append((timestep, others[-1]))
        return torch.zeros_like(latents)

    objective.world_model.forward = note  # type: ignore[method-assign]
    objective(batch, Draws(3, range(2)))
    ((timestep, axis),) = asked
    assert isinstance(axis, ChunkCausal) and axis.sizes == SIZES and axis.window == 1
    assert (timestep[:, 0] == 0).all() and set(timestep[:, 1:].flatten().tolist()) <= set(FEW.timesteps)


def test_noise_lies_on_what_is_clean_after_the_first_frame_alone(streaming: WorldModelConfig):
    seen: list[tuple[Tensor, Tensor]] = []
    for options in ({}, {"history_noise": 0.5}):
        objective = ODEObjective(streaming, clean_history=1.0, **options)

        def note(latents: Tensor, timestep: Tensor, *others: object) -> Tensor:
            seen.append((latents, timestep))
            return torch.zeros_like(latents)

        objective.world_model.forward = note  # type: ignore[method-assign]
        objective(batch_of(streaming), Draws(3, range(2)))
    (plain, timestep), (flawed, _) = seen
    changed = (plain != flawed).any(1).flatten(2).any(2)
    clean = timestep == 0
    assert (changed[:, 1:] == clean[:, 1:]).all() and clean[:, 1:].any() and not changed[:, 0].any()
    assert (flawed - plain).std() < 0.5


def scoring(network: Scorer, clean: Tensor, without: Tensor | None = None) -> None:
    """Let a network take `clean` for the clean video, or `without` where it is given another text."""

    def velocity(batch: dict, noisy: Tensor, sigma: Tensor, text: tuple | None = None) -> Tensor:
        target = clean if text is None or without is None else without
        return (noisy - target) / sigma[:, None, None, None, None]

    network.velocity = velocity  # type: ignore[method-assign]


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_generator_moves_from_the_critic_s_video_to_the_teacher_s(streaming: WorldModelConfig, guidance: float):
    objective, batch = DistillObjective(streaming, guidance=guidance), batch_of(streaming)
    made, fake, real, without = (torch.randn_like(batch["latents"]) for _ in range(4))
    scoring(objective.critic, fake)
    scoring(objective.teacher, real, without)
    wanted = real + guidance * (real - without)
    towards = objective.towards(batch, made, Draws(0, range(2)))
    far = (made - wanted)[:, :, 1:].abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(towards, (wanted - fake) / far, rtol=1e-3, atol=1e-4)


def test_the_generator_s_gradient_is_the_direction(streaming: WorldModelConfig):
    objective, batch = DistillObjective(streaming, guidance=0.0), batch_of(streaming)
    made = torch.randn_like(batch["latents"]).requires_grad_()
    direction = torch.randn_like(made)
    objective.generator.rollout = lambda batch, draws: made  # type: ignore[method-assign]
    objective.generator.towards = lambda batch, made, draws: direction
    objective(batch, Draws(0, range(2)))[0].backward()
    expected = -direction / direction[:, :, 1:].numel()
    expected[:, :, 0] = 0  # the image
    torch.testing.assert_close(made.grad, expected)


def test_a_critic_that_is_the_teacher_teaches_nothing(streaming: WorldModelConfig):
    torch.manual_seed(0)
    objective, batch = DistillObjective(streaming, guidance=0.0), batch_of(streaming)
    loss, _ = objective.generator(batch, Draws(0, range(2)))
    assert loss == 0


def test_each_learner_trains_its_own_network_alone(streaming: WorldModelConfig):
    torch.manual_seed(0)
    objective, batch = DistillObjective(streaming, guidance=1.0), batch_of(streaming)
    shaken(objective.critic)
    learners = objective.learners()
    assert objective.turns(0) == ("generator", "critic") and objective.turns(1) == ("critic",)
    for name, learner in learners.items():
        objective.zero_grad()
        loss, _ = learner(batch, Draws(0, range(2), step=1))
        loss.backward()
        moved = {n.partition(".")[0] for n, p in objective.named_parameters() if p.grad is not None}
        assert moved == {name} and torch.isfinite(loss)
    trained = [n for n, p in objective.named_parameters() if p.requires_grad]
    assert not any("text" in n or n.startswith("teacher") for n in trained)


@pytest.mark.parametrize("name", ["ode", "generator", "critic"])
def test_a_clip_draws_the_same_in_every_batch(name: str, streaming: WorldModelConfig):
    torch.manual_seed(0)
    objective, batch = DistillObjective(streaming, guidance=1.0), batch_of(streaming)
    shaken(objective.critic)
    learner = ODEObjective(streaming) if name == "ode" else objective.learners()[name]
    together, _ = learner(batch, Draws(5, [2, 3]))
    alone = [learner({key: x[n : n + 1] for key, x in batch.items()}, Draws(5, [2 + n]))[0] for n in range(2)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=0)


def test_clips_of_a_step_leave_together_whichever_worker_has_them():
    drawn = [[Draws(7, [clip], step=step).common(4) for step in range(40)] for clip in (0, 5)]
    assert drawn[0] == drawn[1] and set(drawn[0]) == set(range(4))


def test_a_trajectory_stops_at_the_levels_and_at_every_sigma_between():
    sigmas = schedule(8, 4.0)
    runs = trajectory_sigmas(sigmas, [1.0, float(sigmas[2]), 0.5])
    assert [len(run) for run in runs] == [3, 6, 3]
    assert all(float(run[-1]) == pytest.approx(float(after[0])) for run, after in zip(runs, runs[1:], strict=False))
    passed = torch.cat([runs[0], *(run[1:] for run in runs[1:])])
    torch.testing.assert_close(passed, torch.cat([sigmas, torch.tensor([0.5])]).sort(descending=True).values)

"""Distribution matching: a few-step network learns from what it makes itself (stage 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import chunk_sizes
from longtake.model.dit.replay import Replay
from longtake.model.objectives.draws import Draws
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.objective import Batch, Loss, Objective
from longtake.model.samplers.flow_euler import shift_sigma
from longtake.model.samplers.self_forcing import self_forcing
from longtake.model.stream import ChunkStream
from longtake.model.text import build_text_encoder

_LOWEST, _HIGHEST = 0.02, 0.98  # sigma at which samples are scored


class Generator(FlowObjective):
    """The chunk-causal network that is trained. towards(batch, made, draws): how its videos (B, C, T, h, w) are to
    change.
    """

    towards: Callable[[Batch, Tensor, Draws], Tensor]
    replay: Replay | None = None

    def rollout(self, batch: Batch, draws: Draws) -> Tensor:
        """A video after each clip's first frame. Its chunks leave after a step that all workers draw alike."""
        timesteps, shape = self.config.sampler.timesteps[:-1], batch["latents"].shape[1:]
        network = ChunkStream(self.world_model, *self.encode_text(batch), self.camera(batch), replay=self.replay)

        def noise(frames: int) -> Tensor:
            return draws.normal(shape[0], frames, *shape[2:])

        return self_forcing(
            network,
            noise,
            chunk_sizes(shape[1], self.config.chunk_size),
            [timestep / 1000 for timestep in timesteps],
            draws.common(len(timesteps)),
            batch["latents"][:, :, :1].float(),
        )

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        made = self.rollout(batch, draws)
        wanted = made.detach() + self.towards(batch, made.detach(), draws)
        loss = 0.5 * (made - wanted)[:, :, 1:].square().mean()
        return loss, {"generator_loss": loss.detach()}


class Scorer(FlowObjective):
    """A network that sees whole videos."""

    def velocity(self, batch: Batch, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Of videos, the first frame clean and the others at sigma (B,), by their captions or another text."""
        timestep = 1000 * sigma[:, None].repeat(1, noisy.shape[2])
        timestep[:, 0] = 0
        text = text or self.encode_text(batch)
        return self.world_model(noisy, timestep, *text, self.camera(batch)).float()


class Critic(Scorer):
    """The network that learns what the generator makes: flow matching on its `rollout`s."""

    rollout: Callable[[Batch, Draws], Tensor]
    score_shift: float

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        with torch.no_grad():
            made = self.rollout(batch, draws)
        noisy, noise, sigma = _noised(made, draws, self.score_shift)
        return (self.velocity(batch, noisy, sigma) - (noise - made))[:, :, 1:].square().mean(), {}


class DistillObjective(Objective):
    """Self-forcing with distribution matching (SANA-WM section 4.5, after DMD, arXiv 2405.14867).

    The generator makes a video by itself, chunk after chunk. At a sigma that is drawn for it, a bidirectional critic,
    trained along to know the generator's videos, and the frozen bidirectional teacher both say what is clean of it: the
    generator moves along the difference. The critic starts as the teacher. Text encoders stay as they are. batch: as of
    `FlowObjective`; of latents the first frame alone is read.

    teacher: weights folder; "" is a random one. guidance: the teacher's, how far it goes on from its answer to
    `negative_prompt` past that to the caption; 0 is no further. score_shift: of the sigmas that videos are scored at.
    generator_every: how many steps of the critic are one of the generator. critic_rate: the critic's learning rate over
    the generator's. teacher_dtype: of its weights. replay: passes of rollouts that have no gradient go through CUDA
    graphs, which are worth their memory for a small network.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        teacher: str = "",
        guidance: float = 3.0,
        negative_prompt: str = "",
        score_shift: float = 10.0,
        generator_every: int = 5,
        critic_rate: float = 0.2,
        teacher_dtype: str = "float32",
        replay: bool = False,
    ):
        super().__init__()
        bidirectional = dataclasses.replace(config, chunk_causal=False, chunk_window=None)
        folder = Path(teacher) if teacher else None
        theirs = weights.config_for(bidirectional, folder) if folder else bidirectional
        self.guidance, self.score_shift, self.generator_every = guidance, score_shift, generator_every
        self.rates = {"generator": 1.0, "critic": critic_rate}
        self.generator, self.critic, self.teacher = Generator(config), Critic(theirs), Scorer(theirs)
        if folder:
            self.teacher.load(folder)
        self.critic.load_state_dict(self.teacher.state_dict())
        self.generator.towards = self.towards
        self.generator.replay = Replay(self.generator.world_model) if replay else None
        self.critic.rollout, self.critic.score_shift = self.generator.rollout, score_shift
        self.teacher.requires_grad_(False)
        for network in (self.generator, self.critic):
            network.world_model.null_caption.requires_grad_(False)
            if network.text is not None:
                network.text.requires_grad_(False)
        self._negative: tuple[Tensor, Tensor] | None = None
        if guidance and theirs.text.frozen and not folder:  # random, as the teacher
            self._negative = torch.randn(1, theirs.text.length, theirs.text_dim), torch.ones(1, theirs.text.length)
        elif guidance:
            encoder = self.teacher.text or build_text_encoder(theirs, teacher)
            self._negative = encoder.encode([negative_prompt], negative=True)
        self.teacher.world_model.to(getattr(torch, teacher_dtype))

    def learners(self) -> Mapping[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic",) if step % self.generator_every else ("generator", "critic")

    @property
    def exported(self) -> nn.Module:
        return self.generator

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        return self.generator(batch, draws)

    @torch.no_grad()
    def towards(self, batch: Batch, made: Tensor, draws: Draws) -> Tensor:
        """From what the critic takes for the clean video to what the teacher does, over how far that is from it."""
        noisy, _, sigma = _noised(made, draws, self.score_shift)
        fake, real = (network.velocity(batch, noisy, sigma) for network in (self.critic, self.teacher))
        if self._negative is not None:
            features, mask = (each.to(made.device).expand(len(made), *each.shape[1:]) for each in self._negative)
            real = real + self.guidance * (real - self.teacher.velocity(batch, noisy, sigma, (features, mask)))
        level = sigma[:, None, None, None, None]  # what is clean is noisy - level * velocity
        far = (made - noisy + level * real)[:, :, 1:].abs().mean((1, 2, 3, 4), keepdim=True)
        return level * (fake - real) / far.clamp(min=1e-6)

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Draws) -> Tensor:
        return self.generator.sample(batch, draws)

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        self.generator.export(folder, dtype)

    def load(self, folder: Path) -> None:
        self.generator.load(folder)


def _noised(made: Tensor, draws: Draws, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Videos with noise on all frames but the first, the noise, and its sigmas (B,)."""
    sigma = shift_sigma(draws.uniform(), shift).clamp(_LOWEST, _HIGHEST)
    noise, level = draws.normal(*made.shape[1:]), sigma[:, None, None, None, None]
    noisy = (1 - level) * made + level * noise
    noisy[:, :, 0] = made[:, :, 0]
    return noisy, noise, sigma


OBJECTIVE = DistillObjective

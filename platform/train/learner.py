"""What one optimizer trains: DeepSpeed's engine around a module, a step of it, and its part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.model.objectives import Draws
from longtake.platform.train import reshard
from longtake.platform.train.feed import Batch
from longtake.platform.train.muon import Muon, matrices_and_others
from longtake.platform.train.stages import Stage


class Update(NamedTuple):
    """Of a step: the mean loss of this worker's micro-batches, the last one's metrics, the gradients' norm, and whether
    they were finite: otherwise the weights are as they were.
    """

    loss: Tensor
    metrics: dict[str, Tensor | float]
    norm: Tensor | float
    finite: bool


class Learner:
    """`module` on its device, trained as the stage says at `rate` times its learning rate.

    workers: of the run; share: of a step, (clips a forward pass, passes). tag: of its files in a checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: Stage,
        share: tuple[int, int],
        workers: int,
        rate: float = 1.0,
        tag: str = "state",
    ) -> None:
        self.module, self.stage, self.rate, self.tag, self.workers = module, stage, rate, tag, workers
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.without_frozen = getattr(module, "frozen_from", None) is not None
        self.device = self.trained[0].device
        self.accumulation = share[1]
        self._engine = self._initialised(*share)

    def _initialised(self, micro: int, accumulation: int) -> Any:
        """DeepSpeed accumulates, partitions and autocasts, and clips what it partitions; parameters stay float32."""
        import deepspeed
        from deepspeed.runtime.zero import stage_1_and_2

        deepspeed.logger.setLevel("ERROR")
        # To take their norm it would copy all gradients to float64.
        stage_1_and_2.get_norm_dtype = lambda: torch.float32  # type: ignore[assignment]
        stage = self.stage
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": stage.grad_clip if stage.zero_stage else 0.0,
            # Gradients are summed while the ones before them are computed.
            "zero_optimization": {"stage": stage.zero_stage, "overlap_comm": self.device.type == "cuda"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 30,
        }
        if stage.offload:
            # Gradients leave in smaller portions: of the usual ones, those under way take gigabytes.
            config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 100_000_000}
            config["zero_force_ds_cpu_optimizer"] = False  # torch's own needs no compiler
        if self.device.type == "cuda" and stage.dtype == "bfloat16":
            # DeepSpeed turns off an autocast from outside. No safe modules: gradients are summed in float32.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        engine = deepspeed.initialize(
            model=self.module, optimizer=self._optimizer(), config=config, dist_init_required=False
        )[0]
        # Without partitions it copies every gradient once more, even for a single worker.
        engine.enable_backward_allreduce = self.workers > 1 or stage.zero_stage > 0
        return engine

    def _optimizer(self) -> torch.optim.Optimizer:
        stage = self.stage
        values: dict[str, Any] = dict(
            lr=stage.learning_rate * self.rate, betas=stage.betas, eps=stage.eps, weight_decay=stage.weight_decay
        )
        if stage.optimizer == "muon":
            return Muon(*matrices_and_others(self.module), **values)
        return torch.optim.AdamW(self.trained, **values, fused=self.device.type == "cuda")

    def update(self, batches: Iterable[tuple[Batch, Draws]], rate: float) -> Update:
        """One step over the micro-batches at the stage's learning rate `rate`; gradients that are not finite change
        nothing.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * self.rate
        mean, metrics = torch.zeros((), device=self.device), {}
        norm, finite = 0.0, True
        for part, (batch, draws) in enumerate(batches):
            loss, metrics = self._engine(batch, draws)
            # A loss that is not finite may have gradients that are, and those are what the other workers see.
            self._engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
            if not self.stage.zero_stage and part == self.accumulation - 1:
                # DeepSpeed's own goes through the parameters one by one: tens of milliseconds for a small model. Its
                # ZeRO looks at the norm by itself, and also waits for the device.
                norm = nn.utils.clip_grad_norm_(self.trained, self.stage.grad_clip or math.inf)
                if not (finite := bool(norm.isfinite())):
                    self._engine.zero_grad()  # the optimiser leaves alone what has no gradient
            self._engine.step()
            mean += loss.detach() / self.accumulation
        if self.stage.zero_stage:
            finite, norm = self._engine.was_step_applied(), self._engine.get_global_grad_norm()
        return Update(mean, metrics, norm, finite)

    def is_finite(self) -> bool:
        """Whether all weights are."""
        return all(bool(torch.isfinite(p).all()) for p in self.trained)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write this worker's files into a checkpoint."""
        self._engine.save_checkpoint(
            str(folder), self.tag, state, save_latest=False, exclude_frozen_parameters=self.without_frozen
        )

    def load(self, checkpoint: Path, *, rank: int, barrier: Callable[[], None]) -> dict[str, Any]:
        """Go on from a checkpoint of any number of workers; returns what `save` was given. Of all workers together."""
        if self.stage.zero_stage and reshard.written_by(checkpoint, self.tag) != self.workers:
            state = reshard.load(self._engine, checkpoint, self.tag, rank=rank, barrier=barrier)
        else:
            strict = not self.without_frozen
            _, state = self._engine.load_checkpoint(str(checkpoint), tag=self.tag, load_module_strict=strict)
        if self.stage.zero_stage == 3:
            # Loading gathers small parameters. DeepSpeed learns which modules use another's parameters when it finds
            # them apart, in the first pass, and would have none in the backward pass.
            self._engine.optimizer.checkpoint_event_prologue()
        return state

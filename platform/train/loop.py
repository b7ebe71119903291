"""The training loop of one worker: Ray Train starts it, learners (learner.py) train, the stage says everything else.

RUN/metrics.jsonl has a line every `log_every` steps; checkpoints/ what a re-run continues from; weights/ a weights
folder with the moving average; loss.png, sample.png and sample.mp4 what a person looks at.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longtake.model.objectives import Draws, build_objective
from longtake.platform.observe import notices
from longtake.platform.observe.notices import say
from longtake.platform.parallel.context import own_clip
from longtake.platform.train import checkpoint, log
from longtake.platform.train.ema import EMA
from longtake.platform.train.feed import Batch, LatentSource, Mixed, Source, draw, open_sources, stream
from longtake.platform.train.learner import Learner
from longtake.platform.train.log import Log
from longtake.platform.train.order import Share
from longtake.platform.train.schedule import Clock, learning_rate
from longtake.platform.train.settings import Settings
from longtake.platform.train.stages import Stage

_MOST_SKIPPED = 10  # updates in a row


def train(settings: Settings, source: Source | None = None) -> None:
    """What every Ray Train worker runs: the stage from its newest checkpoint to its end.

    source: the stage's clips; by default the worker looks for them itself.
    """
    os.environ[notices.FILE] = str(settings.folder / log.NOTICES)
    worker = Worker(settings, source or open_sources(settings.stage, settings.config, settings.data))
    worker.run()
    worker.close()


class Worker:
    """One rank: module, optimiser, samples, and the step that it has reached."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self.settings, self.stage, self.source = settings, settings.stage, source
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        _prepare(self.device, self.workers)
        self.micro, self.accumulation = self.stage.micro_batches(self.workers)
        replicas = self.workers // self.stage.context_parallel
        self.share = Share(self.rank // self.stage.context_parallel, replicas, self.micro)
        torch.manual_seed(self.stage.seed)
        # A large base is built where it stays: on the host it would take minutes, and twice its memory.
        frozen_base = self.stage.objective == "refiner" and settings.config.refiner.lora_rank
        with self.device if frozen_base else contextlib.nullcontext():
            self.objective = build_objective(self.stage.objective, settings.config, self.stage.options)
        self.objective.start({part: Path(folder) for part, folder in settings.init.items()})
        self.objective.to(self.device)
        if self.stage.context_parallel > 1:
            frames = settings.config.latent_frames(self.stage.frames)
            sharing = self.stage.context_parallel, self.stage.attention_exchange
            self.objective.time_axis = own_clip(settings.config, frames, *sharing)
        if self.stage.checkpoint_blocks:
            for module in self.objective.modules():
                if hasattr(module, "checkpoint_blocks"):
                    module.checkpoint_blocks = True  # type: ignore[assignment]
        share = self.micro, self.accumulation
        self.learners = {
            tag: Learner(module, self.stage, share, self.workers, self.objective.rates.get(tag, 1.0), tag)
            for tag, module in self.objective.learners().items()
        }
        if self.device.type == "cuda":
            _speed_up(self.objective, self.stage)  # DeepSpeed takes no other layout than torch's own
        self.ema = EMA(self.objective.exported, self.stage.ema) if self.stage.ema else None
        self.step, seconds = self._resume()
        self.clock = Clock(self.stage.steps, settings.max_minutes and 60 * settings.max_minutes, seconds)
        self.saved_step, self.saved_seconds = self.step, seconds
        # Of the last update that was made.
        self.loss = torch.zeros(())
        self.metrics: dict[str, Tensor | float] = {}
        self.skipped = self.skipped_in_a_row = 0
        self.waited = 0.0
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        """This worker's micro-batches from the one that it has reached."""
        stage = self.stage
        first, count = self.step * self.accumulation, (stage.steps - self.step) * self.accumulation
        if stage.cache and stage.objective != "vae":
            assert isinstance(self.source, LatentSource | Mixed)
            where = self.device if stage.cache == "device" else torch.device("cpu")
            return draw(self.source, where, self.share, first, count, self.device)
        return stream(self.source, self.share, first, count, self.device)

    def run(self) -> None:
        """Train until the steps or the minutes are used up; ends with a checkpoint, the weights and their pictures."""
        stage = self.stage
        records = Log(self.settings.folder, stage, self.step, *self._clip_costs()) if self.rank == 0 else None
        while True:
            seconds = self.clock.tick(self.step)
            progress = self.clock.progress(self.step)
            minutes = (seconds - self.saved_seconds) / 60
            at_steps = stage.checkpoint_steps and self.step % stage.checkpoint_steps == 0
            due = at_steps or 0 < stage.checkpoint_minutes <= minutes
            if progress >= 1 or (due and self.step > self.saved_step and not self.skipped_in_a_row):
                if self.step > self.saved_step:
                    self._save()
                self._write_results()
            if progress >= 1:
                break
            if self.clock.noticed and self.step > self.saved_step:
                self._save()
                if self.rank == 0:
                    say(f"a machine of this run is about to be taken away: step {self.step} is saved")
            rate = learning_rate(stage, self.step, progress)
            self._update(rate)
            if self.metrics and (self.step % stage.log_every == 0 or self.step in (1, stage.steps)):
                values = self._averaged({"loss": self.loss, **self.metrics}) | {"skipped": self.skipped}
                if records:
                    records.write(self.step, values, rate, self.clock.now(), self.waited)
                self.waited, self.skipped = 0.0, 0

    def _update(self, rate: float) -> None:
        """One step over this worker's share of the batch, of each network whose turn it is."""
        turns, finite = self.objective.turns(self.step), True
        batches = (self._micro_batch(part) for part in range(self.accumulation))
        for tag, each in zip(turns, [batches] if len(turns) == 1 else [[*batches]] * len(turns), strict=True):
            loss, metrics, norm, fits = self.learners[tag].update(each, rate)
            finite &= fits
            if fits:
                name = "grad_norm" if tag == turns[-1] else f"grad_norm_{tag}"
                self.loss, self.metrics = loss, self.metrics | metrics | {name: norm}
        self.step += 1
        if not finite:
            self._skip()
            return
        self.skipped_in_a_row = 0
        if self.ema:
            self.ema.update()

    def _micro_batch(self, part: int) -> tuple[Batch, Draws]:
        first = self.share.start(self.step * self.accumulation + part)
        draws = Draws(self.stage.seed, range(first, first + self.micro), self.device, self.step)
        begin = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - begin
        return batch, draws

    def _skip(self) -> None:
        """Count an update that was not made. ValueError after too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == _MOST_SKIPPED:
            raise self._diverged(f"the gradients of {_MOST_SKIPPED} steps in a row are not finite")
        if self.rank == 0:
            say("a step's gradients are not finite: it is left out, and counted as `skipped` in metrics.jsonl")

    def _clip_costs(self) -> tuple[float, float]:
        """Latent tokens of a clip, padded ones too, over the workers, and the seconds that they take at their peak; 0
        if unknown.
        """
        if self.stage.objective == "vae":
            return 0, 0
        from longtake.model.flops import forward_flops, peak_flops  # brings along the world model

        config, frames = self.settings.config, self.settings.config.latent_frames(self.stage.frames)
        tokens = frames * math.prod(config.latent_size)
        peak = peak_flops(self.device)
        if self.stage.objective != "flow" or not peak:  # a refiner's step is of other networks
            return tokens / self.workers, 0
        return tokens / self.workers, 3 * forward_flops(config, frames) / (peak * self.workers)

    def _averaged(self, values: dict[str, Tensor | float]) -> dict[str, float]:
        """The values' means over all workers; waits for the device."""
        means = torch.stack([torch.as_tensor(value, device=self.device).float() for value in values.values()])
        if self.workers > 1:
            dist.all_reduce(means)
            means /= self.workers
        return dict(zip(values, means.tolist(), strict=True))

    def _save(self) -> None:
        """A checkpoint of all workers. ValueError when training has diverged."""
        self._check_finite()
        folder = self.settings.folder / "checkpoints"

        def write_files(partial: Path) -> None:
            state = {"step": self.step, "seconds": self.clock.now(), "frozen_from": self.objective.frozen_from}
            if self.ema and self.rank == 0:
                state["ema"] = self.ema.state_dict()
            for learner in self.learners.values():
                learner.save(partial, state)
                state = {}  # once is enough

        checkpoint.write(folder, self.step, write_files, rank=self.rank, barrier=_barrier)
        if self.rank == 0:
            checkpoint.prune(folder, keep=2)
        self.saved_step, self.saved_seconds = self.step, self.clock.agreed

    def _check_finite(self) -> None:
        if not all(learner.is_finite() for learner in self.learners.values()):
            raise self._diverged("weights are not finite")

    def _diverged(self, how: str) -> ValueError:
        return ValueError(
            f"training diverged before step {self.step} ({how}): lower learning_rate "
            f"(now {self.stage.learning_rate}) with --set; run again to go on from step {self.saved_step}"
        )

    def _resume(self) -> tuple[int, float]:
        """Step and seconds of the newest whole checkpoint of this run, (0, 0) without one."""
        newest = checkpoint.newest(self.settings.folder / "checkpoints")
        if newest is None:
            return 0, 0.0
        state: dict[str, Any] = {}
        for learner in self.learners.values():
            state = learner.load(newest, rank=self.rank, barrier=_barrier) | state
        if (saved := state.get("frozen_from")) != self.objective.frozen_from:
            raise ValueError(
                f"this run began from frozen weights {saved or 'of its own'}, --init now gives "
                f"{self.objective.frozen_from or 'none'}: give those again, or choose another --run"
            )
        if self.ema and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        return state["step"], state["seconds"]

    def _write_results(self) -> None:
        """RUN/weights and the pictures, from the averaged weights."""
        with self._whole_weights(), self.ema.applied() if self.ema else contextlib.nullcontext():
            if self.rank == 0:
                from longtake.platform.train import results  # seconds of imports, which other workers have no need of

                results.export_weights(self.objective, self.settings.config, self.settings.init, self.settings.folder)
                if self.stage.zero_stage < 3:  # its modules run on all workers or on none
                    results.draw(self.objective, self.settings, self.device)
        _barrier()

    def _whole_weights(self) -> contextlib.AbstractContextManager:
        """Inside, every worker has all of what is exported."""
        if self.stage.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.objective.exported.parameters()))

    def close(self) -> None:
        """Stop reading ahead."""
        self.batches.close()  # type: ignore[attr-defined]


def _prepare(device: torch.device, workers: int) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # Ray allows as many as CPUs it reserved


def _speed_up(objective: nn.Module, stage: Stage) -> None:
    """Layouts and compilation for a GPU. Blocks are compiled one by one, since equal ones share their code."""
    # DeepSpeed's autocast ends with the forward pass: unless told, compiled gradients are cast and eager ones are not.
    torch._functorch.config.backward_pass_autocast = "off"  # type: ignore[attr-defined]
    if stage.objective == "vae":
        objective.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # what cuDNN reads
    for name in stage.compiled if stage.compile else ():
        if getattr(objective, name.partition(".")[0]) is None:  # of pairs there is no stage 1
            continue
        module = objective.get_submodule(name)
        for part in module if isinstance(module, nn.ModuleList) else (module,):
            part.compile(mode=stage.compile)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()

"""The training stages as a table of values, per preset; every run is one frozen `Stage`.

Values of `sana-wm` are the published ones (SANA-WM paper, Table 7, and the released stage-1 configuration); a comment
says where none was published. Learning rates of `tiny` are peaks of a cosine.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from longtake.model import presets
from longtake.model.config import SamplerConfig

Objective = Literal["vae", "flow", "ode", "distill", "refiner"]
Corpora = tuple[tuple[str, float], ...]  # stores that a stage draws from, each with its weight in the mix


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    frames: raw frames of the clips (or of the clips that the latents encode). pad: clips that have fewer are padded; of
    the flow objective. window: raw frames a sample of the VAE stage. batch_size: clips (windows) a step over all
    workers; micro_batch_size: clips a forward pass of one worker, None for as many as the batch gives each worker.
    steps: the most steps; a time limit may end the run before.
    warmup: steps. ema: decay of the weights' moving average, 0 for none. optimizer: "adamw", or "muon" (muon.py).
    options: keyword arguments of the objective. model: fields of the preset's configuration that this stage trains with
    other values. init_from: stages one of whose weights this one needs to start from.
    context_parallel: workers that share a clip, a stretch of its frames each; of the flow objective.
    attention_exchange: how they share softmax attention, by "heads" or in a "ring" (platform/parallel/context.py); more
    workers a clip than the model has heads want the ring.
    zero_stage: DeepSpeed ZeRO 0 to 3. offload: ZeRO keeps the optimizer's state in host memory, and updates there.
    checkpoint_blocks: compute the network's blocks once more in the backward pass instead of keeping what they
    computed. dtype: what autocast computes in on a GPU; parameters stay float32.
    compiled: sub-modules given to torch.compile on a GPU in mode `compile`, lists of blocks block by block; an empty
    mode compiles nothing.
    windows_per_clip: samples drawn from a clip each time it is read.
    cache: where latents stay once they were read, so that later steps need no host work: "device", "host" or None.
    log_every, checkpoint_steps: steps; checkpoint_minutes: minutes; a zero interval is off.
    """

    name: str
    objective: Objective
    frames: int
    batch_size: int
    learning_rate: float
    steps: int
    pad: bool = False
    window: int = 17
    micro_batch_size: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 1.0
    ema: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    init_from: tuple[str, ...] = ()
    context_parallel: int = 1
    attention_exchange: Literal["heads", "ring"] = "heads"
    zero_stage: int = 0
    offload: bool = False
    checkpoint_blocks: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: str = ""
    compiled: tuple[str, ...] = ()
    windows_per_clip: int = 1
    cache: Literal["device", "host"] | None = None
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        if self.objective not in (known := get_args(Objective)):
            raise ValueError(f"objective {self.objective!r} must be one of {', '.join(known)}")
        if self.batch_size < 1 or self.steps < 1 or self.log_every < 1:
            raise ValueError(f"{self.name}: batch_size, steps and log_every must be at least 1")
        if self.window > self.frames:
            raise ValueError(f"{self.name}: window {self.window} must not exceed the clips' {self.frames} frames")
        if self.batch_size % self.windows_per_clip:
            raise ValueError(f"{self.name}: batch_size {self.batch_size} must be a multiple of windows_per_clip")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage {self.zero_stage} must be 0, 1, 2 or 3")
        if self.optimizer not in ("adamw", "muon") or self.schedule not in ("cosine", "constant"):
            raise ValueError(f"{self.name}: optimizer must be adamw or muon, schedule cosine or constant")
        if self.context_parallel < 1 or (self.context_parallel > 1 and self.objective != "flow"):
            raise ValueError(f"{self.name}: context_parallel must be at least 1, and 1 where no clip can be cut")
        if self.attention_exchange not in ("heads", "ring"):
            raise ValueError(f"attention_exchange {self.attention_exchange!r} must be heads or ring")
        if self.pad and (self.objective != "flow" or self.attention_exchange == "ring"):
            raise ValueError(f"{self.name}: pad is for the flow objective, and for attention_exchange=heads")
        if self.offload and not self.zero_stage:
            raise ValueError("offload is ZeRO's: set zero_stage to 1, 2 or 3, or offload=False")
        if self.checkpoint_blocks and self.objective == "vae":
            raise ValueError(f"{self.name}: checkpoint_blocks is not for autoencoders: set it to False")
        if self.checkpoint_blocks and self.compile == "reduce-overhead":
            # CUDA graphs reuse the memory of a block's last run, and here it runs twice.
            raise ValueError(f"{self.name}: checkpoint_blocks and CUDA graphs exclude each other: set compile=default")
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError("muon needs whole matrices, which ZeRO cuts up: set zero_stage=0 or optimizer=adamw")
        if self.zero_stage == 3 and self.objective == "distill":
            raise ValueError("ZeRO 3 is not for several networks that call each other: set zero_stage to 2 or less")
        if self.zero_stage == 3 and self.ema:
            raise ValueError("ZeRO 3 keeps no whole weights to average: set ema=0, or zero_stage to 2 or less")

    def micro_batches(self, workers: int) -> tuple[int, int]:
        """Clips a forward pass of one worker (or of those that share clips), and passes a step.

        ValueError when they do not divide the batch.
        """
        replicas, rest = divmod(workers, self.context_parallel)
        if rest or not replicas:
            raise ValueError(
                f"{self.name}: {workers} workers must be a multiple of context_parallel {self.context_parallel}: "
                "change --workers, or --set context_parallel"
            )
        share, rest = divmod(self.batch_size, replicas)
        micro = min(self.micro_batch_size or share, share)
        if rest or not share or share % micro:
            raise ValueError(
                f"{self.name}: batch_size {self.batch_size} must be a multiple of workers / context_parallel x "
                f"micro_batch_size = {replicas} x {micro}: change one of them"
            )
        return micro, share // micro


_FLOW = dict(image_condition=0.9, caption_dropout=0.1)

_TINY_GDN = Stage(
    name="stage1_gdn",
    objective="flow",
    frames=81,
    batch_size=64,
    learning_rate=2e-3,
    optimizer="muon",
    steps=20_000,
    warmup=200,
    weight_decay=0.01,
    ema=0.999,
    options=dict(_FLOW),
    model=dict(softmax_every=0),
    compile="reduce-overhead",  # launches bound it: 85 ms a step, 180 in the default mode
    compiled=("world_model.blocks",),
    cache="device",
)
_SANA_GDN = Stage(
    name="stage1_gdn",
    objective="flow",
    frames=81,
    batch_size=64,
    micro_batch_size=1,
    learning_rate=5e-5,
    schedule="constant",
    steps=30_000,
    eps=1e-10,
    grad_clip=0.5,
    options=dict(_FLOW, shift=9.95),
    model=dict(softmax_every=0),
    seed=3407,
    zero_stage=3,
    checkpoint_blocks=True,
)

_TINY_MINUTE = Stage(
    name="stage3_minute",
    objective="flow",
    frames=961,
    batch_size=4,
    learning_rate=5e-4,
    optimizer="muon",
    steps=4_000,
    warmup=50,
    weight_decay=0.01,
    ema=0.995,
    options=dict(_FLOW),
    init_from=("stage2_hybrid",),
    cache="device",
)
_SANA_MINUTE = Stage(
    name="stage3_minute",
    objective="flow",
    frames=961,
    batch_size=32,
    micro_batch_size=1,
    learning_rate=1e-5,
    schedule="constant",
    steps=31_000,
    eps=1e-10,
    grad_clip=0.5,
    options=dict(_FLOW, shift=9.95),
    seed=3407,
    init_from=("stage2_hybrid",),
    context_parallel=2,
    zero_stage=3,
    checkpoint_blocks=True,
)


def _hybrid(gdn: Stage) -> Stage:
    """Stage 2: the values of stage 1, with softmax attention in the preset's blocks."""
    options = dict(gdn.options, replace_gdn=True)
    return dataclasses.replace(gdn, name="stage2_hybrid", options=options, model={}, init_from=(gdn.name,))


def _causal(minute: Stage) -> Stage:
    """Stage 4 begins: with the values of stage 3, its network learns to see no later chunk."""
    model, origin = dict(chunk_causal=True), (minute.name,)
    return dataclasses.replace(minute, name="stage4_causal", model=model, init_from=origin, context_parallel=1)


def _few_steps(sampler: SamplerConfig) -> dict[str, Any]:
    """Fields of a chunk-causal model that makes a chunk in few steps, one after another."""
    return dict(chunk_causal=True, chunk_window=1, sampler=sampler)


_TINY_ODE = Stage(
    name="stage4_ode",
    objective="ode",
    frames=81,
    batch_size=32,
    learning_rate=5e-4,
    optimizer="muon",
    steps=2_000,
    warmup=20,
    weight_decay=0.01,
    ema=0.99,
    options=dict(caption_dropout=0.0, clean_history=0.5),
    model=_few_steps(presets.TINY_STREAMING.sampler),
    init_from=("stage4_causal", "stage3_minute"),
    cache="device",
)
_SANA_ODE = Stage(
    name="stage4_ode",
    objective="ode",
    frames=337,
    batch_size=1,
    learning_rate=2e-5,
    schedule="constant",
    steps=3_000,
    weight_decay=0.01,
    options=dict(caption_dropout=0.0),
    model=_few_steps(presets.SANA_WM_STREAMING.sampler),
    seed=3407,
    init_from=("stage4_causal",),
    zero_stage=2,
    checkpoint_blocks=True,
)
_TINY_DISTILL = Stage(
    name="stage4_distill",
    objective="distill",
    frames=81,
    batch_size=16,
    learning_rate=5e-5,
    steps=2_000,
    betas=(0.0, 0.999),
    grad_clip=10.0,
    ema=0.99,
    options=dict(guidance=0.0, score_shift=4.0, critic_rate=1.0, replay=True),
    model=_few_steps(presets.TINY_STREAMING.sampler),
    init_from=("stage4_ode",),
    cache="device",
)
_SANA_DISTILL = Stage(
    name="stage4_distill",
    objective="distill",
    frames=337,  # published: 700 steps, and then 3,000 of 961 frames
    batch_size=2,
    micro_batch_size=1,
    learning_rate=1e-5,
    schedule="constant",
    steps=700,
    betas=(0.0, 0.999),
    grad_clip=10.0,
    options=dict(guidance=3.0, score_shift=10.0, critic_rate=0.2, teacher_dtype="bfloat16"),
    model=_few_steps(presets.SANA_WM_STREAMING.sampler),
    seed=3407,
    init_from=("stage4_ode",),
    zero_stage=2,
    checkpoint_blocks=True,
)


_TABLE: dict[str, tuple[Stage, ...]] = {
    "tiny": (
        Stage(
            name="stage0_vae",
            objective="vae",
            frames=81,
            window=65,  # 9 latent frames, about what a latent frame is decoded from: windows of 17 end at 3
            batch_size=4,
            learning_rate=3e-3,
            optimizer="muon",
            steps=20_000,
            warmup=200,
            grad_clip=1.0,
            ema=0.999,
            options=dict(squared_weight=40.0),  # measured by PSNR
            compile="reduce-overhead",  # of 8 windows of 17 frames: 20 ms a step, 27 in the default mode, 50 without
            compiled=("vae.encoder", "vae.decoder"),
        ),
        _TINY_GDN,
        _hybrid(_TINY_GDN),
        _TINY_MINUTE,
        _causal(_TINY_MINUTE),
        _TINY_ODE,
        _TINY_DISTILL,
        Stage(
            name="stage5_refiner",
            objective="refiner",
            frames=81,
            batch_size=32,
            learning_rate=2e-3,
            optimizer="muon",
            steps=10_000,
            warmup=100,
            weight_decay=0.01,
            ema=0.999,
            init_from=("stage2_hybrid", "stage3_minute"),
            compile="default",
            compiled=("refiner.transformer.transformer_blocks", "stage1.world_model.blocks"),
            cache="device",
        ),
    ),
    "sana-wm": (
        Stage(
            # The autoencoder is LTX-2's, used as released; these values are ours, for adapting it.
            name="stage0_vae",
            objective="vae",
            frames=81,
            window=17,
            batch_size=64,
            micro_batch_size=1,
            learning_rate=5e-5,
            schedule="constant",
            steps=50_000,
            warmup=500,
            grad_clip=0.5,
            zero_stage=2,
            windows_per_clip=4,
        ),
        _SANA_GDN,
        _hybrid(_SANA_GDN),
        _SANA_MINUTE,
        _causal(_SANA_MINUTE),
        _SANA_ODE,
        _SANA_DISTILL,
        Stage(
            # Published: the objective and the rank-384 LoRA. Batch, learning rate, steps and pairs are ours.
            name="stage5_refiner",
            objective="refiner",
            frames=961,
            batch_size=32,
            micro_batch_size=1,
            learning_rate=1e-4,
            schedule="constant",
            steps=10_000,
            grad_clip=0.5,
            options=dict(pairs=True, base_dtype="bfloat16"),
            seed=3407,
            init_from=("stage2_hybrid", "stage3_minute"),
            zero_stage=3,
            checkpoint_blocks=True,
        ),
    ),
}


def names(preset: str) -> list[str]:
    """The preset's stages in training order."""
    return [stage.name for stage in _TABLE.get(preset, ())]


def get(name: str, preset: str) -> Stage:
    """The preset's stage called `name`; ValueError when the table has none."""
    for stage in _TABLE.get(preset, ()):
        if stage.name == name:
            return stage
    raise ValueError(f"preset {preset!r} has no stage {name!r}: choose one of {', '.join(names(preset)) or 'none'}")


def override(stage: Stage, assignments: Sequence[str]) -> Stage:
    """`stage` with "field=value" assignments applied; "options.NAME=value" sets an entry of options, "model." of model.

    Values are Python literals, bare words are strings. ValueError for an unknown field or a value of another type.
    """
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {"options": dict(stage.options), "model": dict(stage.model)}
    types = {item.name: type(getattr(stage, item.name)) for item in dataclasses.fields(stage)}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"{assignment!r} must be field=value")
        value = _literal(text)
        table, dot, entry = name.partition(".")
        if dot and table in tables:
            tables[table][entry] = value
            continue
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"a stage has no field {name!r}{hint}")
        values[name] = _as_type(name, value, types[name])
    return dataclasses.replace(stage, **values, **tables)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _as_type(name: str, value: Any, kind: type) -> Any:
    """`value` as the field's type. A field that is None now takes what it is given."""
    if kind is type(None) or value is None:
        return value
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is tuple:
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")
    return value

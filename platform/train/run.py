"""From a command line to a training run: every stage's job is `run_stage(name)`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import ray

from longtake.model import presets, sana_video, weights
from longtake.model.checkpoint import local_folder
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import chunk_sizes
from longtake.platform.observe import ray_cluster
from longtake.platform.observe.notices import say
from longtake.platform.store.files import refuse_url
from longtake.platform.train import checkpoint, log, stages
from longtake.platform.train.feed import open_sources
from longtake.platform.train.order import Mixture
from longtake.platform.train.recovery import survive
from longtake.platform.train.settings import Settings
from longtake.platform.train.stages import Corpora, Stage
from longtake.platform.train.tracking import tracking


def run_stage(name: str, argv: list[str] | None = None, about: str | None = None) -> None:
    """Train the stage called `name` as the arguments say. Run again, it goes on where its last checkpoint is."""
    args = stage_parser(name, about).parse_args(argv)
    train_stage(resolve(name, args), args)


def train_stage(settings: Settings, args: argparse.Namespace) -> None:
    """Train a resolved stage, or print it, and say where its results are."""
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        return
    launch(settings, args.wandb, args.survive)
    step = checkpoint.reached(settings.folder / "checkpoints")
    print(f"step {step} of {settings.stage.steps}; results in {settings.folder}:")
    for path in ("weights", "metrics.jsonl", "loss.png", "sample.png", "sample.mp4", "checkpoints"):
        if (settings.folder / path).exists():
            print(f"  {settings.folder / path}")


def resolve(name: str, args: argparse.Namespace) -> Settings:
    """The run that the arguments describe. ValueError for whatever can be known to be wrong before it starts."""
    preset = presets.get(args.preset)
    stage = stages.override(stages.get(name, args.preset), args.set)
    config = configured(preset, stage)
    if args.steps is not None:
        stage = dataclasses.replace(stage, steps=args.steps)
    workers = stage.context_parallel if args.workers is None else args.workers
    stage.micro_batches(workers)
    pieces, of_what = config.latent_frames(stage.frames), "latent frames"
    if config.chunk_causal:
        pieces, of_what = len(chunk_sizes(pieces, config.chunk_size)), "chunks"
    if stage.context_parallel > pieces:
        raise ValueError(f"context_parallel {stage.context_parallel} must be at most {pieces}, the {of_what} of a clip")
    refuse_url("--run", args.run)
    if args.max_minutes is not None and args.max_minutes <= 0:
        raise ValueError(f"--max-minutes {args.max_minutes} must be positive")
    init = find_parts(args.init)
    video = sana_video.find(Path(init["dit"])) if "dit" in init else None
    if video and (stage.objective != "flow" or stage.init_from):
        raise ValueError(f"{video} is a SANA-Video, which {name} does not start from: train stage1_gdn from it first")
    if stage.objective == "vae":
        # Other parts of a weights folder belong to its old latents; exported, they would look like this run's.
        init = {part: folder for part, folder in init.items() if part == "vae"}
        if stage.options.get("freeze_encoder") and not init:
            raise ValueError("freeze_encoder trains the decoder of an autoencoder that exists: give it with --init")
    if not config.text.frozen and init.get("dit") != init.get("text") and not video:
        raise ValueError("--init: transformer/ and text_encoder/ are trained together, give a folder that holds both")
    if stage.objective == "refiner":
        _check_refiner(stage, config, init)
    if stage.init_from and "dit" not in init and not stage.options.get("pairs"):
        raise ValueError(f"{name} starts from the weights of {' or '.join(stage.init_from)}: give its run with --init")
    for part, folder in init.items():
        if part == "dit" and video:
            say(sana_video.account(video, config))
            continue
        saved = weights.config_for(config, Path(folder))
        if part == "dit":
            _check_origin(stage, config, saved, Path(folder))
    return Settings(stage, config, _corpora(args.data), str(Path(args.run).resolve()), init, workers, args.max_minutes)


def _corpora(given: list[str]) -> Corpora:
    """(store, weight) of each "STORE" or "STORE=WEIGHT". ValueError for a store given twice."""
    corpora = {}
    for text in given:
        store, equals, weight = text.rpartition("=")
        try:
            store, share = (store, float(weight)) if equals else (text, 1.0)
        except ValueError:
            store, share = text, 1.0  # a name may hold a "="
        store = store if "://" in store else str(Path(store).resolve())
        if store in corpora:
            raise ValueError(f"--data {store} is given twice: add up its weights")
        corpora[store] = share
    if len(corpora) > 1:
        Mixture(tuple(corpora.values()), 0)
    return tuple(corpora.items())


def configured(preset: WorldModelConfig, stage: Stage) -> WorldModelConfig:
    """The preset as the stage trains it; "refiner." begins the names of the refiner's fields. ValueError for a field
    that a model does not have.
    """
    own, refiner = {}, {}
    for name, value in stage.model.items():
        of_refiner = name.startswith("refiner.")
        (refiner if of_refiner else own)[name.removeprefix("refiner.")] = value
        fields = dataclasses.fields(preset.refiner if of_refiner else preset)
        if name.removeprefix("refiner.") not in {field.name for field in fields}:
            raise ValueError(f"model.{name} is no field of a model's configuration")
    config = dataclasses.replace(preset, **own)
    config = dataclasses.replace(config, refiner=dataclasses.replace(config.refiner, **refiner))
    if config.chunk_causal and (stage.pad or stage.attention_exchange == "ring"):
        raise ValueError(f"{stage.name}: a chunk-causal model trains with pad=False and attention_exchange=heads")
    return config


def _check_refiner(stage: Stage, config: WorldModelConfig, init: dict[str, str]) -> None:
    """ValueError when adapters would lack their base, or its text encoder a refiner that shares stage 1's."""
    if config.refiner.lora_rank and "refiner" not in init:
        raise ValueError(
            f"{stage.name} trains adapters of a refiner that exists: give the folder that holds its refiner/ with "
            "--init, or train all of a new one with a preset whose lora_rank is 0"
        )
    shared = not config.text.frozen and not config.refiner_reads_own_text
    if stage.options.get("pairs") and shared and "text" not in init:
        raise ValueError(f"{stage.name} reads captions through stage 1's text encoder: give stage 1's run with --init")


def _check_origin(stage: Stage, config: WorldModelConfig, saved: WorldModelConfig, folder: Path) -> None:
    """ValueError when a world model to start from is of the wrong stage, reads less of a camera or of the clip, or its
    blocks are of other kinds.
    """
    record = folder.parent / "stage.json"
    if stage.init_from and record.is_file():
        trained = json.loads(record.read_text())["stage"]
        # A refiner's run holds the world model that it was given.
        if trained["objective"] in ("flow", "ode", "distill") and trained["name"] not in (*stage.init_from, stage.name):
            raise ValueError(
                f"{stage.name} starts from the weights of {' or '.join(stage.init_from)}: "
                f"{folder.parent} is a run of {trained['name']}"
            )
    if saved.chunk_causal and not config.chunk_causal:
        raise ValueError(
            f"{folder} sees no later chunk, {stage.name} trains a network that does: choose weights of a stage before"
        )
    if saved.camera_branches not in ("both", config.camera_branches):
        raise ValueError(
            f"{folder} was trained with camera_branches {saved.camera_branches!r}, not {config.camera_branches!r}: "
            f"--set model.camera_branches={saved.camera_branches}"
        )
    if stage.objective == "vae" or saved.softmax_every == config.softmax_every:
        return
    if saved.softmax_every:
        kind, hint = f"softmax attention in every {saved.softmax_every}th block", "choose weights of stage1_gdn"
    elif not stage.options.get("replace_gdn"):
        kind, hint = "GDN in every block", "train stage2_hybrid from it first"
    else:
        return
    raise ValueError(f"{folder} has {kind}, which {stage.name} does not train: {hint}")


def find_parts(folders: list[str]) -> dict[str, str]:
    """The weights folder of each part, over runs and weights folders; the last one given wins.

    A SANA-Video is a world model alone, without a text encoder trained with it; nothing else is read of its pipeline.
    ValueError for a folder that is none of these.
    """
    found: dict[str, str] = {}
    for given in folders:
        folder = local_folder(given)
        if (folder / "weights").is_dir():
            folder = folder / "weights"
        if video := sana_video.find(folder):
            found["dit"] = str(video.resolve())
            found.pop("text", None)
            continue
        parts = {part: str(folder.resolve()) for part, name in weights.FOLDERS.items() if (folder / name).is_dir()}
        if not parts:
            raise ValueError(
                f"--init {given} is neither a run nor a weights folder: it holds none of "
                f"{', '.join(f'{name}/' for name in weights.FOLDERS.values())}"
            )
        found |= parts
    return found


def launch(settings: Settings, wandb_project: str | None = None, losses: int = 3, keep: bool = True) -> None:
    """Train on the Ray cluster that `connect` finds, on GPUs where it has them; `losses` as `survive` takes it.

    keep: save what is trained; otherwise there are only its records (timed.py).
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    source = open_sources(settings.stage, settings.config, settings.data)
    _write_record(settings)
    ray_cluster.connect(num_cpus=settings.workers + 2)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < settings.workers:
        raise ValueError(f"--workers {settings.workers} need a GPU each, the cluster has {gpus}")
    # Ray's own bookkeeping of a run; ours is in RUN/checkpoints, whole or invisible.
    scratch = settings.folder / ".ray"

    def fit() -> None:
        TorchTrainer(
            _worker,
            # The source, so that all workers see the same clips.
            train_loop_config={"keep": keep, "settings": settings, "source": source},
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpus > 0),
            run_config=RunConfig(name=f"{settings.stage.name}-{time.time_ns()}", storage_path=str(scratch)),
        ).fit()

    try:
        with tracking(settings, wandb_project) as send, log.shown(settings.folder, settings.stage, send):
            survive(fit, settings.folder / "checkpoints", losses)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    # Seconds of imports, which only workers need.
    if config.pop("keep"):
        from longtake.platform.train.loop import train as work
    else:
        from longtake.platform.train.timed import timed as work
    work(**config)


def _write_record(settings: Settings) -> None:
    """RUN/stage.json; ValueError when the folder belongs to another stage, model or order of clips."""
    path = settings.folder / "stage.json"
    record = json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.is_file():
        old = json.loads(path.read_text())
        for where, key in (("stage", "name"), ("config", "name"), ("stage", "batch_size"), ("stage", "seed")):
            if old[where][key] != record[where][key]:
                raise ValueError(
                    f"{settings.folder} belongs to a run whose {where} has {key} {old[where][key]!r}, not "
                    f"{record[where][key]!r}: choose another --run"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def stage_parser(name: str, about: str | None, needs_data: bool = True) -> argparse.ArgumentParser:
    """The arguments of a stage's job."""
    parser = argparse.ArgumentParser(prog=name.replace("_", "-"), description=about)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add(
        "--data",
        required=needs_data,
        default=None if needs_data else [],
        action="append",
        metavar="STORE[=WEIGHT]",
        help="clip store (stage 0) or latent store: folder or s3://bucket/prefix; several are mixed by their weights",
    )
    add("--run", default=f"runs/{name}", help="folder of the results; seen by all workers (default: %(default)s)")
    add("--init", action="append", default=[], metavar="FOLDER", help="run or weights to start from; may be repeated")
    add("--workers", type=int, help="training processes, one a GPU; by default as many as share a clip, one for tiny")
    add("--max-minutes", type=float, help="end by then; the learning rate's schedule follows the clock")
    add("--steps", type=int, help="the most steps")
    add("--survive", type=int, default=3, help="losses of workers in a row without a checkpoint (default: %(default)s)")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases, to RUN/wandb unless WANDB_MODE=online")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field of the stage")
    add("--dry-run", action="store_true", help="print the resolved settings")
    return parser

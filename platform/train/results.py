"""What a run leaves for people and for the next stage: a weights folder, a loss curve, a sample."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from longtake.model import weights
from longtake.model.config import WorldModelConfig
from longtake.model.objectives import Draws, Objective
from longtake.platform.evaluate.sheets import contact_sheet
from longtake.platform.store.files import whole
from longtake.platform.store.video import write_video
from longtake.platform.train import log
from longtake.platform.train.feed import open_sources
from longtake.platform.train.settings import Settings


def export_weights(objective: Objective, config: WorldModelConfig, init: dict[str, str], folder: Path) -> None:
    """FOLDER/weights: the trained parts beside those that the run started from; the old one stays until it is whole."""
    partial = folder / "weights.partial"
    shutil.rmtree(partial, ignore_errors=True)
    weights.save_config(config, partial)
    objective.export(partial)
    for part, source in init.items():
        name = weights.FOLDERS[part]
        if not (partial / name).exists():
            shutil.copytree(Path(source) / name, partial / name)
            beside = Path(source) / weights.ADAPTERS
            if part == "refiner" and beside.is_dir() and not (partial / weights.ADAPTERS).exists():
                shutil.copytree(beside, partial / weights.ADAPTERS)
    shutil.rmtree(folder / "weights", ignore_errors=True)
    partial.rename(folder / "weights")


def draw(objective: Objective, settings: Settings, device: torch.device) -> None:
    """FOLDER/loss.png, and what the objective makes of one clip beside the true one, of the test split if there is one.

    Latents become a picture only when the run was given an autoencoder.
    """
    folder = settings.folder
    _loss_curve(folder)
    if "vae" not in settings.init and not objective.samples_pixels:
        return
    stage = settings.stage
    try:
        source = open_sources(stage, settings.config, settings.data, split="test")
    except ValueError:
        source = open_sources(stage, settings.config, settings.data)
    batch = {name: torch.from_numpy(array.copy()).to(device) for name, array in source.batch(0, 1).items()}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a sample's shape is not worth compiling
        sample = objective.sample(batch, Draws(0, [0], device))
        if objective.samples_pixels:
            true, made = sample.chunk(2, dim=2)
        else:
            real = slice(int(batch["frames"][0]) if stage.pad else None)
            true, made = _decode([batch["latents"][:, :, real], sample[:, :, real]], settings)
    frames = {"true": true.cpu().numpy(), "made": made.cpu().numpy()}
    contact_sheet(folder / "sample.png", frames)
    write_video(folder / "sample.mp4", [np.concatenate(list(frames.values()), axis=2)], settings.config.fps)


def _decode(batches: list[torch.Tensor], settings: Settings) -> list[torch.Tensor]:
    """Pixels uint8 (F, H, W, 3) of the first clip of each batch of latents."""
    from longtake.model.vae import build_vae, decode_latents  # seconds of imports, of which a run may have no need

    vae: Any = weights.load_part(build_vae(settings.config), Path(settings.init["vae"]), "vae").to(batches[0].device)
    return [torch.cat(list(decode_latents(vae, latents[:1].float())), dim=1)[0] for latents in batches]


def _loss_curve(folder: Path) -> None:
    records = log.read(folder)
    if not records:
        return
    steps, loss = ([record[name] for record in records] for name in ("step", "loss"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot(steps, loss, linewidth=0.8)
    axes.grid(alpha=0.3)
    with whole(folder / "loss.png") as part:
        figure.savefig(part, dpi=110)

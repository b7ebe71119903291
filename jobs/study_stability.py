"""Train the GDN with its keys scaled in three ways, and see which of them lasts.

SANA-WM scales keys by 1/sqrt(D S), D channels a head and S tokens a frame, so that a frame erases no more of the state
than there is. Here the same network takes the same steps from the same weights with that scale, with 1/sqrt(D) and with
none: still pictures of random latents, AdamW, float32, in this process alone. Figures, and a plot, go to
docs/measurements/stability.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from longtake.model import presets
from longtake.model.config import KEY_SCALES, WorldModelConfig
from longtake.model.parity import Case
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.steps < 1 or args.frames < 1:
        raise ValueError("--steps and --frames must be at least 1")
    # The other safeguard against growth would hide what this is about.
    config = dataclasses.replace(presets.get(args.preset), depth=args.depth, softmax_every=0, contractive_gdn=False)
    if args.dry_run:
        print(json.dumps(vars(args) | {"config": dataclasses.asdict(config)}, indent=2))
        return
    losses: dict[str, list[float]] = {}
    with Progress(len(KEY_SCALES) * args.steps, "steps", "stability") as progress:
        for scale in KEY_SCALES:
            losses[scale] = []
            for loss in train(dataclasses.replace(config, key_scale=scale), args.frames, args.steps, args.device):
                losses[scale].append(loss)
                progress.update(1, loss=loss)
            progress.update(args.steps - len(losses[scale]))
    figures: dict[str, float] = {"steps": args.steps}
    for scale, found in losses.items():
        finite = [loss for loss in found if math.isfinite(loss)]
        figures[f"finite_steps_{scale}"] = len(finite)
        if finite:
            figures[f"first_loss_{scale}"], figures[f"last_finite_loss_{scale}"] = finite[0], finite[-1]
    for name, figure in figures.items():
        print(f"{name:30} {figure:.4g}")
    if args.write:
        written = measurements.write("stability", figures)
        plot(losses, written.with_suffix(".png"))
        print(f"figures: {written}")


def train(config: WorldModelConfig, frames: int, steps: int, device: str) -> list[float]:
    """The loss of each step, ending with the first that is not finite."""
    from longtake.model.dit.world_model import WorldModel

    torch.manual_seed(0)
    model = WorldModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for step in range(steps):
        case = Case("stability", config, frames, *config.latent_size, camera=False)
        clean, timestep, text, mask = (x.to(device) for x in case.inputs(seed=step)[:4])
        clean = clean[:, :, :1].expand_as(clean)  # a still picture can be learnt
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(steps + step)).to(device)
        sigma = (timestep / 1000)[:, None, :, None, None]
        velocity = model((1 - sigma) * clean + sigma * noise, timestep, text, mask)
        loss = (velocity - (noise - clean)).square().mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Loss by step for each scale, to the last finite one."""
    names = {"tokens": "1/sqrt(D S)", "channels": "1/sqrt(D)", "none": "1"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for scale, found in losses.items():
        finite = [loss for loss in found if math.isfinite(loss)]
        axes.plot(range(1, len(finite) + 1), finite, marker=".", label=f"keys x {names[scale]}: {len(finite)} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study-stability", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--depth", type=int, default=4, help="blocks, each of GDN (default: %(default)s)")
    add("--frames", type=int, default=41, help="latent frames of a clip (default: %(default)s)")
    add("--steps", type=int, default=60, help="of training, with each scale (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

"""Compare a rollout chunk by chunk, from what is kept, with passes over all of it.

Random weights in float32, on the CPU: the preset, and four blocks of the full width. Every chunk is made in few steps
from the ones before, and one of its steps, another each time, is computed once more over the whole video so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from torch import Tensor

from longtake.model import presets
from longtake.model.camera import parse_actions, random_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes
from longtake.model.dit.world_model import WorldModel
from longtake.model.samplers.flow_euler import euler, sampler_sigmas
from longtake.model.stream import ChunkStream
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.train import stages
from longtake.platform.train.run import configured

_LIMIT = 1e-5
_AREA = (2, 3)  # rows and columns of a latent frame


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.chunks < 2:
        raise ValueError(f"--chunks {args.chunks} must be at least 2: there is nothing to keep of one")
    preset = presets.get(args.preset)
    wide = dataclasses.replace(presets.get("sana-wm"), depth=4)
    models = (preset, args.preset), (wide, "sana-wm")
    few = [configured(config, stages.get("stage4_distill", name)) for config, name in models]
    configs = [dataclasses.replace(config, softmax_dtype="float32") for config in few]
    if args.dry_run:
        print(json.dumps(vars(args) | {"configs": [dataclasses.asdict(config) for config in configs]}, indent=2))
        return
    figures: dict[str, float] = {}
    with Progress(len(configs) * args.chunks, "chunks", "stream") as progress:
        for config in configs:
            errors = cached_errors(config, args.chunks, progress)
            figures[f"worst_error_{config.name}_depth{config.depth}"] = max(errors)
            figures[f"last_error_{config.name}_depth{config.depth}"] = errors[-1]
    for name, figure in figures.items():
        print(f"{name:36} {figure:.1e}")
    if above := [name for name, figure in figures.items() if not figure <= _LIMIT]:
        raise ValueError(f"{', '.join(above)}: more than {_LIMIT:g}; compare torch with requirements.lock")
    if args.write:
        print(f"figures: {measurements.write('cached_parity', figures)}")


@torch.no_grad()
def cached_errors(config: WorldModelConfig, chunks: int, progress: Progress | None = None) -> list[float]:
    """Of each chunk, the relative error of a step's velocity, of another step each time."""
    torch.manual_seed(0)
    model = WorldModel(config)
    for parameter in model.parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn_like(parameter)
    frames = 1 + config.chunk_size * chunks
    stride, sizes = config.vae_stride, chunk_sizes(frames, config.chunk_size)
    image = _AREA[0] * stride[1], _AREA[1] * stride[2]
    path = parse_actions(random_actions(stride[0] * (frames - 1), seed=0), fps=config.fps, image_size=image)
    camera = path.features(image, stride)
    text, mask = torch.randn(1, config.text.length, config.text_dim), torch.ones(1, config.text.length)
    network, sigmas = ChunkStream(model, text, mask, camera), sampler_sigmas(config.sampler)
    made = torch.empty(1, config.latent_channels, 0, *_AREA)
    errors: list[float] = []
    for number, size in enumerate(sizes):
        before, whole = made, ChunkCausal(sizes[: number + 1], config.chunk_window)
        steps = iter(range(len(sigmas) - 1))

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            cached = network.velocity(x, timestep, [x.shape[2]])
            if next(steps) == number % (len(sigmas) - 1):  # noqa: B023  # called in this round alone
                every = torch.cat([before, x], 2)  # noqa: B023
                times = torch.cat([timestep.new_zeros(1, before.shape[2]), timestep], 1)  # noqa: B023
                seen = camera.frames(0, every.shape[2])
                true = model(every, times, text, mask, seen, whole)[:, :, -x.shape[2] :]  # noqa: B023
                errors.append(float((cached - true).norm() / true.norm()))
            return cached

        noise = torch.randn(1, config.latent_channels, size, *_AREA)
        latents = euler(velocity, noise, sigmas, 0 if number else 1)
        network.keep(latents, [size])
        made = torch.cat([made, latents], 2)
        if progress:
            progress.update(1, largest=max(errors))
    return errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check-stream", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--chunks", type=int, default=30, help="of a rollout (default: %(default)s)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

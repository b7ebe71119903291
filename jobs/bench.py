"""Time the world model beside diffusers' implementation of it, with the same random weights.

Both in one process; a speed is printed only where the outputs agree. LONGTAKE_KERNELS=triton measures the fused kernels
on a GPU. Figures, and a plot beside them, go to docs/measurements/speed_DEVICE.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from longtake.kernels.launch import kernels
from longtake.model import convert, presets
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel
from longtake.model.flops import forward_flops
from longtake.model.parity import Case, as_diffusers_computes, diffusers_model
from longtake.platform.observe import measurements, timing
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress

_LARGEST_ERROR = 0.1  # of an output in bfloat16 against the definition in float32, beyond which no speed means anything


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = as_diffusers_computes(presets.get(args.preset))
    if args.depth:
        config = dataclasses.replace(config, depth=args.depth)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    if args.name:
        measurements.check_name(args.name)
    if min([*args.gdn, *args.forward, *args.train], default=1) < 1:
        raise ValueError("--gdn, --forward and --train take numbers of latent frames, at least 1")
    if args.dry_run:
        print(json.dumps(vars(args) | {"config": dataclasses.asdict(config)}, indent=2))
        return
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures = timing.rates(device, dtype)
    pair = Pair(config, device, dtype)
    if smallest := min([*args.gdn, *args.forward, *args.train], default=0):
        figures |= pair.errors(smallest)
    work = [(pair.gdn, args.gdn), (pair.forward, args.forward), (pair.train, args.train)]
    with Progress(sum(len(lengths) for _, lengths in work), "measurements", "bench") as progress:
        for measure, lengths in work:
            for frames in lengths:
                figures |= measure(frames)
                progress.update(1)
    for name, figure in figures.items():
        print(f"{name:36} {figure:.4g}")
    if args.write:
        name = args.name or f"speed_{args.device}"
        written = measurements.write(name, figures)
        _plot(figures, written.with_suffix(".png"))
        print(f"figures: {written}")


class Pair:
    """Our network and diffusers' with the same weights on one device."""

    def __init__(self, config: WorldModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        with device:
            theirs = diffusers_model(config)
            tensors = convert.from_diffusers(theirs.state_dict(), config)
            ours = WorldModel(config)
        ours.load_state_dict(tensors)
        self.ours, self.theirs = ours.to(dtype).eval(), theirs.to(dtype)  # type: ignore[call-arg]

    def errors(self, frames: int) -> dict[str, float]:
        """Relative errors of both against our definition in float32. ValueError where ours is too large."""
        inputs = self._inputs(frames)
        ours, theirs = self._ours(inputs).float(), self._theirs(inputs).float()
        exact = self._exact(inputs)
        found = {
            "error_ours": float((ours - exact).norm() / exact.norm()),
            "error_peer": float((theirs - exact).norm() / exact.norm()),
        }
        if not found["error_ours"] <= _LARGEST_ERROR:
            raise ValueError(f"our output is off by {found['error_ours']:.2g} of its norm: no speed is worth measuring")
        return found

    @torch.no_grad()
    def _exact(self, inputs: tuple) -> Tensor:
        """The definition in float32, from the rounded weights."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            with kernels(triton=False):
                return self.ours.float()(*inputs)
        finally:
            self.ours.to(self.dtype)
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    def gdn(self, frames: int) -> dict[str, float]:
        """Both branches of one layer's GDN, from projected features to what is projected back; also its definition."""
        attention: Any = self.ours.blocks[0].attn
        given: list[tuple] = []
        mix, attention.mix = attention.mix, lambda *args: given.append(args) or mix(*args)
        self._ours(self._inputs(frames))
        attention.mix = mix
        x, main, camera, at = given[0]
        leaves = [tensor.detach().requires_grad_() for tensor in (*main, *camera)]

        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                out, out_camera = mix(x, tuple(leaves[:3]), tuple(leaves[3:]), at)
                if backward:
                    torch.autograd.grad([out.float().sum() + out_camera.float().sum()], leaves)

        forward = self._measured(lambda: run(False))[0]
        figures = {
            f"gdn_layer_fwd_ms_T{frames}": forward,
            f"gdn_layer_bwd_ms_T{frames}": self._measured(lambda: run(True))[0] - forward,
        }
        with kernels(triton=False):
            figures[f"gdn_layer_definition_fwd_ms_T{frames}"] = self._measured(lambda: run(False))[0]
        return figures

    def forward(self, frames: int) -> dict[str, float]:
        """Times, their ratio, and peaks of memory of one forward pass over a clip of `frames` latent frames."""
        inputs = self._inputs(frames)
        difference = self._ours(inputs).float() - (peer := self._theirs(inputs)).float()
        if not (error := float(difference.norm() / peer.float().norm())) <= 2 * _LARGEST_ERROR:
            raise ValueError(f"at {frames} frames our output differs from the peer's by {error:.2g} of its norm")
        return self._compared("forward", frames, lambda: self._ours(inputs), lambda: self._theirs(inputs), 1)

    def train(self, frames: int) -> dict[str, float]:
        """As `forward`, of a forward and backward pass with recomputed blocks."""
        inputs = self._inputs(frames)

        def step(model: torch.nn.Module, run: Callable[[tuple], Tensor]) -> None:
            run(inputs).float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        self.theirs.enable_gradient_checkpointing()
        self.theirs.train()
        self.ours.checkpoint_blocks = True
        try:
            return self._compared(
                "train",
                frames,
                lambda: step(self.ours, lambda x: self.ours(*x)),
                lambda: step(self.theirs, lambda x: self._peer(x)),
                4,
            )
        finally:
            self.theirs.eval()
            self.ours.checkpoint_blocks = False

    def _compared(
        self, what: str, frames: int, ours: Callable[[], Any], theirs: Callable[[], Any], passes: int
    ) -> dict[str, float]:
        time_ours, peak = self._measured(ours)
        figures = {
            f"{what}_ms_T{frames}": time_ours,
            f"{what}_peak_gb_T{frames}": peak,
            f"{what}_tflops_T{frames}": passes * forward_flops(self.config, frames) / time_ours / 1e9,
        }
        try:
            time_theirs, peak = self._measured(theirs)
        except torch.OutOfMemoryError:
            return figures  # the peer cannot: there is no ratio
        return figures | {
            f"{what}_peer_ms_T{frames}": time_theirs,
            f"{what}_peer_peak_gb_T{frames}": peak,
            f"{what}_ratio_T{frames}": time_theirs / time_ours,
        }

    def _measured(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds and peak GB, both models' weights included."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return timing.milliseconds(work, self.device), measurements.peak_memory() / 1e9

    def _inputs(self, frames: int) -> tuple:
        case = Case("bench", self.config, frames, *self.config.latent_size)
        latents, timestep, text, mask, camera = case.inputs()
        assert camera is not None
        moved = (x.to(self.device) for x in (latents, timestep, text, mask))
        return *moved, camera.to(self.device)

    @torch.no_grad()
    def _ours(self, inputs: tuple) -> Tensor:
        return self.ours(*inputs)

    @torch.no_grad()
    def _theirs(self, inputs: tuple) -> Tensor:
        return self._peer(inputs)

    def _peer(self, inputs: tuple) -> Tensor:
        latents, timestep, text, mask, camera = inputs
        return self.theirs(
            latents.to(self.dtype),
            timestep[:, None],
            text[:, None].to(self.dtype),
            mask=mask,
            camera_conditions=camera.conditions.to(self.dtype),
            chunk_plucker=camera.plucker.to(self.dtype),
            return_dict=False,
        )[0]


def _plot(figures: dict[str, float], path: Path) -> None:
    """Milliseconds by length, ours and the peer's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="latent frames", ylabel="ms", xscale="log", yscale="log")
    for what in ("forward", "train"):
        for of, label in (("", "ours"), ("peer_", "diffusers")):
            prefix = f"{what}_{of}ms_T"
            lengths = sorted(int(name.removeprefix(prefix)) for name in figures if name.startswith(prefix))
            if lengths:
                axes.plot(lengths, [figures[f"{prefix}{t}"] for t in lengths], marker="o", label=f"{what}, {label}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--depth", type=int, default=0, help="blocks; 0 for as many as the preset has (default: %(default)s)")
    for what, lengths in (("gdn", [121]), ("forward", [6, 21, 41, 121]), ("train", [11, 41, 121])):
        add(f"--{what}", type=int, nargs="*", default=lengths, metavar="T", help=f"latent frames (default: {lengths})")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--name", help="of the file in docs/measurements; by default speed_DEVICE")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

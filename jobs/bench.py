"""Time the world model beside diffusers' implementation of it, with the same random weights.

Both in one process; a speed is printed only where the outputs agree. A forward pass of ours is a denoising step, with
what a sample computes once computed before. Figures, and a plot beside them, go to docs/measurements/speed_DEVICE.
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

from longtake.kernels.attention import attend, attend_float8, choose
from longtake.kernels.cases import cases
from longtake.kernels.launch import kernels
from longtake.model import convert, presets
from longtake.model.config import WorldModelConfig
from longtake.model.dit.attention import SoftmaxAttention
from longtake.model.dit.replay import Replay
from longtake.model.dit.world_model import WorldModel
from longtake.model.flops import forward_flops
from longtake.model.parity import Case, as_diffusers_computes, diffusers_model
from longtake.platform.observe import measurements, timing
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress

_LARGEST_ERROR = 0.1  # of an output in bfloat16 against the definition in float64, beyond which no speed means anything
_FRAMES_OF_GRADIENTS = 2  # whose errors are measured: all that a GPU holds in float64 with the weights


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = as_diffusers_computes(presets.get(args.preset))
    if args.depth:
        config = dataclasses.replace(config, depth=args.depth)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    if args.name:
        measurements.check_name(args.name)
    if min([*args.kernels, *args.gdn, *args.forward, *args.train], default=1) < 1:
        raise ValueError("--kernels, --gdn, --forward and --train take numbers of latent frames, at least 1")
    if args.dry_run:
        print(json.dumps(vars(args) | {"config": dataclasses.asdict(config)}, indent=2))
        return
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures = timing.rates(device, dtype)
    pair = Pair(config, device, dtype)
    lengths = [*args.kernels, *args.gdn, *args.forward, *args.train]
    if smallest := min(lengths, default=0):
        figures |= pair.errors(smallest)
    if args.train:
        figures |= pair.gradient_errors(min(_FRAMES_OF_GRADIENTS, smallest))
    work = [
        (pair.kernels, args.kernels),
        (pair.gdn, args.gdn),
        (pair.forward, args.forward),
        (pair.train, args.train),
        (pair.fusion, args.train[:1]),
    ]
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
        self.replay = Replay(self.ours)
        self.weights = sum(parameter.numel() * parameter.element_size() for parameter in self.ours.parameters())

    @torch.no_grad()
    def errors(self, frames: int) -> dict[str, float]:
        """Relative errors of both against our definition in float64, from the rounded weights. ValueError where ours is
        too large.
        """
        inputs = self._inputs(frames)
        found = {"error_ours": self._step(inputs)(), "error_peer": self._theirs(inputs)}
        exact = self._exact(lambda: self.ours(*inputs))
        errors = {name: float((out.double() - exact).norm() / exact.norm()) for name, out in found.items()}
        if not errors["error_ours"] <= _LARGEST_ERROR:
            raise ValueError(
                f"our output is off by {errors['error_ours']:.2g} of its norm: no speed is worth measuring"
            )
        return errors

    def gradient_errors(self, frames: int) -> dict[str, float]:
        """As `errors`, of the gradients of all weights of the mean square of the output."""
        inputs = self._inputs(frames)
        ours = self._gradients(self.ours, lambda: self.ours(*inputs))
        theirs = convert.from_diffusers(self._gradients(self.theirs, lambda: self._peer(inputs)), self.config)
        exact = self._exact(lambda: self._gradients(self.ours, lambda: self.ours(*inputs)))
        norm = sum(float(gradient.double().square().sum()) for gradient in exact.values()) ** 0.5
        errors = {}
        for name, found in (("error_gradients_ours", ours), ("error_gradients_peer", theirs)):
            parts = [(found[key].double() - gradient.double()).square().sum() for key, gradient in exact.items()]
            errors[name] = float(sum(parts)) ** 0.5 / norm
        return errors

    def _gradients(self, model: torch.nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
        """By the names of the state dict, kept off the device; zeros for what the output does not depend on."""
        run().square().mean().backward()
        found = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
        found |= {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    def _exact(self, run: Callable[[], Any]) -> Any:
        """By the definitions, in float64, which leaves a GPU no room for the peer."""
        self.theirs.cpu()
        self.ours.double().checkpoint_blocks = True
        try:
            with kernels(triton=False):
                return run()
        finally:
            self.ours.to(self.dtype).checkpoint_blocks = False
            self.replay = Replay(self.ours)  # the weights have moved
            torch.nn.Module.to(self.theirs, self.device)

    def kernels(self, frames: int) -> dict[str, float]:
        """Each operator's time, its definition's, and the GB/s of the bytes that it has to move."""
        config, figures = self.config, {}
        sizes = config.num_heads, config.head_dim, int(config.hidden_size * config.mlp_ratio)
        with torch.no_grad():
            for name, work, size in cases(frames, config.latent_size, *sizes, self.device, self.dtype):
                time = timing.milliseconds(work, self.device)
                figures |= {f"{name}_ms_T{frames}": time, f"{name}_gb_per_s_T{frames}": size / time / 1e6}
                with kernels(triton=False):
                    figures[f"{name}_definition_ms_T{frames}"] = timing.milliseconds(work, self.device)
            return figures | self._attentions(frames)

    def _attentions(self, frames: int) -> dict[str, float]:
        """One branch's softmax attention, what torch's fastest takes, and float8 with its error for normal inputs."""
        rows, columns = self.config.latent_size
        shape = 1, frames * rows * columns, self.config.num_heads, self.config.head_dim
        q, k, v = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(3))
        scale = self.config.head_dim**-0.5
        time = timing.milliseconds(lambda: attend(q, k, v, scale), self.device)
        figures = {
            f"attention_ms_T{frames}": time,
            f"attention_tflops_T{frames}": 4 * q.numel() * q.shape[1] / time / 1e9,
            f"attention_float8_ms_T{frames}": timing.milliseconds(lambda: attend_float8(q, k, v, scale), self.device),
        }
        if self.device.type == "cuda":
            by_torch = [ms for name, ms in choose(q, k, v, scale).milliseconds.items() if name != "hopper"]
            figures[f"attention_torch_ms_T{frames}"] = min(by_torch)
        q, k, v = (x[:, :4096] for x in (q, k, v))
        exact = attend(q.double(), k.double(), v.double(), scale)
        figures["attention_float8_error"] = float((attend_float8(q, k, v, scale) - exact).norm() / exact.norm())
        return figures

    def gdn(self, frames: int) -> dict[str, float]:
        """Both branches of one layer's GDN, from projected features to what is projected back; also its definition."""
        attention: Any = self.ours.blocks[0].attn
        given: list[tuple] = []
        mix, attention.mix = attention.mix, lambda *args: given.append(args) or mix(*args)
        with torch.no_grad():
            self.ours(*self._inputs(frames))
        del attention.mix
        x, main, camera, at, others = given[0]
        leaves = [tensor.detach().requires_grad_() for tensor in (*main, *camera)]

        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                out, out_camera = mix(x, tuple(leaves[:3]), tuple(leaves[3:]), at, others)
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
        ours = self._step(inputs)
        difference = ours().float() - (peer := self._theirs(inputs)).float()
        if not (error := float(difference.norm() / peer.float().norm())) <= 2 * _LARGEST_ERROR:
            raise ValueError(f"at {frames} frames our output differs from the peer's by {error:.2g} of its norm")
        self.replay = Replay(self.ours)  # what a graph holds counts among the peak of its first step
        return self._compared("forward", frames, ours, lambda: self._theirs(inputs), forward_flops(self.config, frames))

    def train(self, frames: int) -> dict[str, float]:
        """As `forward`, of a forward and backward pass with recomputed blocks."""
        inputs = self._inputs(frames)
        self.theirs.enable_gradient_checkpointing()
        self.theirs.train()
        self.ours.checkpoint_blocks = True
        try:
            return self._compared(
                "train",
                frames,
                lambda: self._train(self.ours, lambda: self.ours(*inputs)),
                lambda: self._train(self.theirs, lambda: self._peer(inputs)),
                4 * forward_flops(self.config, frames) - self._attention_flops(frames),
            )
        finally:
            self.theirs.eval()
            self.ours.checkpoint_blocks = False

    def fusion(self, frames: int) -> dict[str, float]:
        """How many times faster a training step is by the kernels than by their definitions."""
        inputs, times = self._inputs(frames), []
        self.ours.checkpoint_blocks = True
        for triton in (False, True):
            with kernels(triton):
                times.append(self._measured(lambda: self._train(self.ours, lambda: self.ours(*inputs)))[0])
        self.ours.checkpoint_blocks = False
        return {"fused_over_unfused_train": times[0] / times[1]}

    @staticmethod
    def _train(model: torch.nn.Module, run: Callable[[], Tensor]) -> None:
        run().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    def _compared(
        self, what: str, frames: int, ours: Callable[[], Any], theirs: Callable[[], Any], flops: int
    ) -> dict[str, float]:
        time_ours, peak = self._measured(ours)
        figures = {
            f"{what}_ms_T{frames}": time_ours,
            f"{what}_peak_gb_T{frames}": peak,
            f"{what}_tflops_T{frames}": flops / time_ours / 1e9,
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

    def _attention_flops(self, frames: int) -> int:
        """Of the softmax attention in one forward pass, which recomputation leaves out: both branches."""
        rows, columns = self.config.latent_size
        blocks = sum(isinstance(module, SoftmaxAttention) for module in self.ours.modules())
        return 2 * blocks * 4 * (frames * rows * columns) ** 2 * self.config.hidden_size

    def _measured(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds and peak GB, without the other network's weights."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return timing.milliseconds(work, self.device), (measurements.peak_memory() - self.weights) / 1e9

    def _inputs(self, frames: int) -> tuple:
        case = Case("bench", self.config, frames, *self.config.latent_size)
        latents, timestep, text, mask, camera = case.inputs()
        assert camera is not None
        moved = (x.to(self.device) for x in (latents, timestep, text, mask))
        return *moved, camera.to(self.device)

    @torch.no_grad()
    def _step(self, inputs: tuple) -> Callable[[], Tensor]:
        """A denoising step of ours."""
        latents, timestep, text, mask, camera = inputs
        context = self.ours.context(latents.shape[2:], text, mask, camera, of_sample=True)
        return lambda: self.replay.velocity(latents, timestep, context)

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
    for what, lengths in (("kernels", [121]), ("gdn", [121]), ("forward", [6, 21, 41, 121]), ("train", [11, 41, 121])):
        add(f"--{what}", type=int, nargs="*", default=lengths, metavar="T", help=f"latent frames (default: {lengths})")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--name", help="of the file in docs/measurements; by default speed_DEVICE")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)

"""A clip cut between processes against the same clip on one: velocity, loss and every parameter's gradient."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from longtake.model.camera import CameraFeatures, camera_features, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel
from longtake.platform.parallel.context import AttentionExchange, ContextParallel

LIMIT = 1e-5  # of relative errors in float32


@dataclass(frozen=True)
class Layout:
    """`frames` latent frames on `ranks` processes, which need not divide evenly; `attention` as `ContextParallel`."""

    ranks: int
    frames: int
    attention: AttentionExchange = "heads"

    @property
    def name(self) -> str:
        return f"cp{self.ranks}_frames{self.frames}" + ("_ring" if self.attention == "ring" else "")


def relative_errors(config: WorldModelConfig, layout: Layout, device: str = "cpu") -> dict[str, float]:
    """Largest relative error of "velocity", "loss" and "gradient", the latter over all parameters, in float32.

    The processes are started here: over gloo on CPUs, over NCCL on the first `layout.ranks` GPUs. Random weights, a
    batch of two clips of 2 x 3 tokens a frame.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, layout, device, folder)
        processes.start_processes(_on_a_rank, arguments, nprocs=layout.ranks, start_method="spawn")  # type: ignore[attr-defined]
        cut = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(layout.ranks)]
    model, clip = _model_and_clip(config, layout.frames, device)
    velocity = model(**clip)
    loss = _loss(velocity, layout.frames)
    loss.backward()
    gradients = _gradients(model)
    if gradients.keys() != cut[0]["gradients"].keys():
        raise RuntimeError("a rank's parameters with a gradient are not those of one process")
    return {
        "velocity": _error(torch.cat([rank["velocity"] for rank in cut], dim=2), velocity),
        "loss": _error(cut[0]["loss"], loss),
        "gradient": max(_error(cut[0]["gradients"][name], gradient) for name, gradient in gradients.items()),
    }


def _on_a_rank(rank: int, config: WorldModelConfig, layout: Layout, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=layout.ranks)
    try:
        model, clip = _model_and_clip(config, layout.frames, where)
        axis, camera = ContextParallel(layout.frames, attention=layout.attention), clip["camera"]
        clip["latents"], clip["timestep"] = axis.held(clip["latents"], 2), axis.held(clip["timestep"], 1)
        clip["camera"] = CameraFeatures(axis.held(camera.conditions, 1), axis.held(camera.plucker, 2))
        velocity = model(**clip, time_axis=axis)
        loss = _loss(velocity, layout.frames)
        loss.backward()
        gradients = _gradients(model)
        for shared in (loss.detach_(), *gradients.values()):
            dist.all_reduce(shared)
        found = {"velocity": velocity.detach(), "loss": loss, "gradients": gradients}
        torch.save(_on_cpu(found), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def _model_and_clip(
    config: WorldModelConfig, frames: int, device: str | torch.device
) -> tuple[WorldModel, dict[str, Any]]:
    """The same on every process: drawn on the CPU from one seed."""
    torch.backends.cudnn.allow_tf32 = False  # unlike matrix products, convolutions would round to it
    torch.manual_seed(0)
    model = WorldModel(config)
    for parameter in model.parameters():  # what starts at zero would hide its neighbours
        parameter.data += 0.05 * torch.randn_like(parameter)
    half = (frames - 1) * config.vae_stride[0] // 2
    stride_h, stride_w = config.vae_stride[1:]
    size = 2 * stride_h, 3 * stride_w
    trajectory = parse_actions(f"w-{half},dw-{half}", fps=16, image_size=size)
    poses, pinholes = (x.float()[None].repeat(2, *[1] * x.ndim) for x in (trajectory.c2w, trajectory.intrinsics))
    camera = camera_features(poses, pinholes, size, config.vae_stride)
    clip = dict(
        latents=torch.randn(2, config.latent_channels, frames, 2, 3).to(device),
        timestep=(torch.rand(2, frames) * 1000).to(device),
        text=torch.randn(2, config.text.length, config.text_dim).to(device),
        text_mask=torch.ones(2, config.text.length, device=device),
        camera=CameraFeatures(camera.conditions.to(device), camera.plucker.to(device)),
    )
    return model.to(device), clip


def _loss(velocity: Tensor, frames: int) -> Tensor:
    """A rank's share of a mean over the clip's frames."""
    return velocity.square().mean((0, 1, 3, 4)).sum() / frames


def _gradients(model: WorldModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _error(found: Tensor, true: Tensor) -> float:
    true = true.detach().cpu()
    return float((found - true).norm() / true.norm().clamp(min=1e-6))


def _on_cpu(found: Any) -> Any:
    return {key: _on_cpu(value) for key, value in found.items()} if isinstance(found, dict) else found.cpu()

"""A clip cut between processes against the same clip on one: velocity, loss and every parameter's gradient; and the
bytes that they sent against the maths.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from longtake.model.camera import CameraFeatures, camera_features, parse_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import ChunkCausal, chunk_sizes
from longtake.model.dit.time_axis import WHOLE_CLIP, TimeAxis
from longtake.model.dit.world_model import WorldModel
from longtake.platform.parallel.context import AttentionExchange, own_clip
from longtake.platform.parallel.traffic import Shared, Traffic, account

LIMIT = 1e-5  # of relative errors in float32
_CLIPS, _AREA = 2, (2, 3)  # of the batch; rows and columns of its latent frames


@dataclass(frozen=True)
class Layout:
    """`frames` latent frames on `ranks` processes, which need not divide evenly; `attention` as `ContextParallel`.

    real: how many frames of each of the batch's two clips are no padding; by default all.
    """

    ranks: int
    frames: int
    attention: AttentionExchange = "heads"
    real: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        ring, padded = "_ring" if self.attention == "ring" else "", "_padded" if self.real else ""
        return f"cp{self.ranks}_frames{self.frames}{ring}{padded}"


@dataclass(frozen=True)
class Comparison:
    """errors: the largest relative errors of "velocity", "loss" and "gradient", the latter over all parameters.
    traffic: of every rank and kind of block; more than one of a kind where its blocks send different amounts.
    """

    errors: dict[str, float]
    traffic: list[Traffic]


def compare(config: WorldModelConfig, layout: Layout, device: str = "cpu") -> Comparison:
    """The two ways of computing a clip, in float32 throughout.

    The processes are started here: over gloo on CPUs, over NCCL on the first `layout.ranks` GPUs. Random weights, a
    batch of two clips of 2 x 3 tokens a frame.
    """
    return compare_all([(config, layout)], device)[0]


def compare_all(cases: Sequence[tuple[WorldModelConfig, Layout]], device: str = "cpu") -> list[Comparison]:
    """`compare` of each case. Those of as many ranks share their processes, whose start takes longer than they do."""
    cases = [(dataclasses.replace(config, softmax_dtype="float32"), layout) for config, layout in cases]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in dict.fromkeys(layout.ranks for _, layout in cases):
            theirs = {number: case for number, case in enumerate(cases) if case[1].ranks == ranks}
            processes.start_processes(_on_a_rank, (theirs, device, folder), nprocs=ranks, start_method="spawn")  # type: ignore[attr-defined]
        return [
            _compared(*case, device, [torch.load(_file(folder, number, rank)) for rank in range(case[1].ranks)])
            for number, case in enumerate(cases)
        ]


def _compared(config: WorldModelConfig, layout: Layout, device: str, cut: list[dict[str, Any]]) -> Comparison:
    """cut: what each rank computed."""
    model, clip = _model_and_clip(config, layout, device)
    whole = WHOLE_CLIP
    if config.chunk_causal:
        whole = ChunkCausal(chunk_sizes(layout.frames, config.chunk_size), config.chunk_window)
    velocity, loss = _velocity_and_loss(model, clip, layout, whole)
    loss.backward()
    gradients = _gradients(model)
    if gradients.keys() != cut[0]["gradients"].keys():
        raise RuntimeError("a rank's parameters with a gradient are not those of one process")
    errors = {
        "velocity": _error(torch.cat([rank["velocity"] for rank in cut], dim=2), velocity),
        "loss": _error(cut[0]["loss"], loss),
        "gradient": max(_error(cut[0]["gradients"][name], gradient) for name, gradient in gradients.items()),
    }
    shared = Shared(layout.frames, layout.ranks, layout.attention, _CLIPS, math.prod(_AREA))
    traffic = (found for rank, each in enumerate(cut) for found in account(config, shared, rank, each["sent"]))
    return Comparison(errors, list(dict.fromkeys(traffic)))


def _file(folder: str, number: int, rank: int) -> Path:
    return Path(folder, f"{number}-{rank}.pt")


def _on_a_rank(rank: int, cases: dict[int, tuple[WorldModelConfig, Layout]], device: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    for number, (config, layout) in cases.items():
        backend, store = "nccl" if device == "cuda" else "gloo", f"file://{folder}/store{number}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=layout.ranks)
        try:
            torch.save(_shared(config, layout, where), _file(folder, number, rank))
        finally:
            dist.destroy_process_group()


def _shared(config: WorldModelConfig, layout: Layout, where: torch.device) -> dict[str, Any]:
    """This rank's velocity, the sums over all ranks of the loss and its gradients, and what it sent."""
    model, clip = _model_and_clip(config, layout, where)
    axis, camera = own_clip(config, layout.frames, layout.ranks, layout.attention), clip["camera"]
    clip["latents"], clip["timestep"] = axis.held(clip["latents"], 2), axis.held(clip["timestep"], 1)
    clip["camera"] = CameraFeatures(axis.held(camera.conditions, 1), axis.held(camera.plucker, 2))
    model.checkpoint_blocks = True  # unlike the one process
    sent = axis.peers.noting([*model.blocks])
    velocity, loss = _velocity_and_loss(model, clip, layout, axis)
    loss.backward()
    gradients = _gradients(model)
    for shared in (loss.detach_(), *gradients.values()):
        dist.all_reduce(shared)
    return _on_cpu({"velocity": velocity.detach(), "loss": loss, "gradients": gradients}) | {"sent": sent}


def _model_and_clip(
    config: WorldModelConfig, layout: Layout, device: str | torch.device
) -> tuple[WorldModel, dict[str, Any]]:
    """The same on every process: drawn on the CPU from one seed."""
    torch.backends.cudnn.allow_tf32 = False  # unlike matrix products, convolutions would round to it
    torch.manual_seed(0)
    model = WorldModel(config)
    for parameter in model.parameters():  # what starts at zero would hide its neighbours
        parameter.data += 0.05 * torch.randn_like(parameter)
    frames, real = layout.frames, layout.real
    half = (frames - 1) * config.vae_stride[0] // 2
    stride_h, stride_w = config.vae_stride[1:]
    size = _AREA[0] * stride_h, _AREA[1] * stride_w
    trajectory = parse_actions(f"w-{half},dw-{half}", fps=16, image_size=size)
    poses, pinholes = (x.float()[None].repeat(_CLIPS, *[1] * x.ndim) for x in (trajectory.c2w, trajectory.intrinsics))
    camera = camera_features(poses, pinholes, size, config.vae_stride)
    clip = dict(
        latents=torch.randn(_CLIPS, config.latent_channels, frames, *_AREA).to(device),
        timestep=(torch.rand(_CLIPS, frames) * 1000).to(device),
        text=torch.randn(_CLIPS, config.text.length, config.text_dim).to(device),
        text_mask=torch.ones(_CLIPS, config.text.length, device=device),
        camera=CameraFeatures(camera.conditions.to(device), camera.plucker.to(device)),
        frames=None if real is None else torch.tensor(real),
    )
    return model.to(device), clip


def _velocity_and_loss(
    model: WorldModel, clip: dict[str, Any], layout: Layout, axis: TimeAxis
) -> tuple[Tensor, Tensor]:
    """Velocity with zeros for padding, and a rank's share of its mean square over the clips' real frames."""
    counts = torch.tensor(layout.real or [layout.frames] * _CLIPS)[:, None]
    real = axis.held(torch.arange(layout.frames) < counts, 1).to(clip["latents"].device)
    velocity = model(**clip, time_axis=axis) * real[:, None, :, None, None]
    return velocity, (velocity.square().mean((1, 3, 4)) / counts.to(real.device)).sum()


def _gradients(model: WorldModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _error(found: Tensor, true: Tensor) -> float:
    true = true.detach().cpu()
    return float((found - true).norm() / true.norm().clamp(min=1e-6))


def _on_cpu(found: Any) -> Any:
    return {key: _on_cpu(value) for key, value in found.items()} if isinstance(found, dict) else found.cpu()

"""LoRA adapters of the refiner, what its training on a large base changes (SANA-WM section 4.4).

A folder of them holds the same matrices twice: adapter_config.json and adapter_model.safetensors are peft's,
pytorch_lora_weights.safetensors is what diffusers' LTX-2 pipeline loads. Each file names the base that they were
trained on by its digest, in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longtake.model import weights
from longtake.model.checkpoint import save_safetensors

# Queries, keys, values and outputs of both attentions, and both layers of the feed-forward; none of LTX-2's audio.
_TARGETS = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
_PEFT, _DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PREFIXES = {_PEFT: "base_model.model.", _DIFFUSERS: "transformer."}
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapters:
    """Of linear layers by their names in `VideoTransformer`: matrices (rank, in) and (out, rank), whose product times
    `scale` is added to the layer's. base: the digest of the base that they were trained on, "" where nothing says it.
    """

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    base: str

    @property
    def rank(self) -> int:
        return next(iter(self.matrices.values()))[0].shape[0]


def attach(transformer: nn.Module, rank: int, layers: Sequence[str] = ()) -> None:
    """Freeze the network and put adapters of this rank into it, float32, that change nothing yet: into these layers, or
    into all that training adapts.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds of imports, which only adapters need

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers) or _TARGETS)
    inject_adapter_in_model(config, transformer)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trained(transformer: nn.Module) -> nn.Module:
    """The adapters that were attached, and nothing else, as one module."""
    return nn.ModuleList(part for name, part in transformer.named_modules() if name.endswith((".lora_A", ".lora_B")))


def save(transformer: nn.Module, folder: Path, base: str, dtype: torch.dtype) -> None:
    """Write what is attached to a network into the folder refiner_lora/ of a weights folder, in both formats."""
    from peft import LoraConfig

    target = folder / weights.ADAPTERS
    target.mkdir(parents=True, exist_ok=True)
    found = {name.replace(".default", ""): x for name, x in transformer.state_dict().items() if ".lora_" in name}
    rank = next(x.shape[0] for name, x in found.items() if name.endswith(_DOWN))
    LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, inference_mode=True).save_pretrained(str(target))
    for file, prefix in _PREFIXES.items():
        named = {prefix + name: x for name, x in found.items()}
        save_safetensors(named, target / file, dtype, {"format": "pt", "base": base})


def read(folder: Path) -> Adapters:
    """The adapters in a folder, or in its refiner_lora/, of either format.

    ValueError where there are none, and for tensors that are no LoRA of linear layers, of one rank.
    """
    folder = folder / weights.ADAPTERS if (folder / weights.ADAPTERS).is_dir() else folder
    file = next((folder / name for name in _PREFIXES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no adapters: neither {_PEFT} nor {_DIFFUSERS}")
    with safe_open(file, framework="pt") as opened:
        tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    matrices = {}
    for name in tensors:
        layer = name.removesuffix(_DOWN).removesuffix(_UP)
        if layer == name or {layer + _DOWN, layer + _UP} - tensors.keys():
            raise ValueError(f"{file}: tensor {name} is no half of a LoRA's two matrices")
        matrices[layer.removeprefix(_PREFIXES[file.name])] = tensors[layer + _DOWN], tensors[layer + _UP]
    if len({down.shape[0] for down, _ in matrices.values()}) != 1:
        raise ValueError(f"{file}: adapters must be of one rank")
    return Adapters(matrices, _scale(file, about), about.get("base", ""))


def _scale(file: Path, about: Mapping[str, str]) -> float:
    """What the product of the matrices is multiplied by: LoRA's alpha over its rank, 1 where a file does not say it."""
    if file.name == _PEFT:
        config: dict[str, Any] = json.loads((file.parent / "adapter_config.json").read_text())
        return config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    config = json.loads(about.get("lora_adapter_metadata", "{}"))
    return config.get("transformer.lora_alpha", 1) / config.get("transformer.r", 1)


def check_base(adapters: Adapters, base: str, where: str) -> None:
    """ValueError when adapters were trained on another base than the one in `where`, whose digest is `base`."""
    if adapters.base != base:
        trained_on = f"the base {adapters.base}" if adapters.base else "a base that they do not name"
        raise ValueError(
            f"these adapters were trained on {trained_on}, {where} is {base}: give their own base, or merge them with "
            "`longtake merge-adapters --onto FOLDER --other-base`"
        )


def load(transformer: nn.Module, adapters: Adapters) -> None:
    """Go on from adapters in a network that has some attached. ValueError when they are of another rank or layers."""
    own = {name: x for name, x in transformer.state_dict(keep_vars=True).items() if ".lora_" in name}
    given = {}
    for layer, (down, up) in adapters.matrices.items():
        given[f"{layer}.lora_A.default.weight"], given[f"{layer}.lora_B.default.weight"] = down, up * adapters.scale
    if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in given.items()}:
        rank = next(x.shape[0] for name, x in own.items() if ".lora_A" in name)
        raise ValueError(
            f"adapters of rank {adapters.rank} are not of the rank {rank}, or the layers, that are trained"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


@torch.no_grad()
def merge(tensors: Mapping[str, Tensor], adapters: Adapters) -> None:
    """Add the adapters to a refiner's tensors by name, in place, in float32. ValueError for a layer that it lacks."""
    for layer, (down, up) in adapters.matrices.items():
        matrix = tensors.get(f"{layer}.weight")
        if matrix is None or matrix.shape != (up.shape[0], down.shape[1]):
            needed, there = (up.shape[0], down.shape[1]), None if matrix is None else tuple(matrix.shape)
            raise ValueError(f"adapters of {layer} are for a matrix of shape {needed}, the refiner's is {there}")
        if not matrix.is_meta:
            change = adapters.scale * (up.to(matrix.device).float() @ down.to(matrix.device).float())
            matrix.copy_(matrix.float() + change)


def merge_beside(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Merge into the tensors of a weights folder's refiner the adapters that lie beside it there, if any do.

    ValueError when they were trained on another base.
    """
    if not (folder / weights.ADAPTERS).is_dir():
        return
    adapters = read(folder)
    if not any(tensor.is_meta for tensor in tensors.values()):
        place = folder / weights.FOLDERS["refiner"]
        check_base(adapters, weights.digest(place), str(place))
    merge(tensors, adapters)

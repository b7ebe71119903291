"""A weights folder: one sub-folder a part, in diffusers' layout, and the configuration that binds them.

  config.json   preset name, sampler, options of the release
  vae/  transformer/  text_encoder/  refiner/   config.json and safetensors, one file or sharded
  refiner_lora/  adapters of the refiner (refiner/adapters.py), where it was trained so: refiner/ is then their base
  refiner_text/  of a refiner that reads text by itself: text_encoder/, tokenizer/, connectors/

Loading is strict: a missing, extra or wrongly shaped tensor is a ValueError that names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.model import convert
from longtake.model.checkpoint import load_safetensors, local_folder, save_safetensors
from longtake.model.config import RefinerConfig, SamplerConfig, TextConfig, WorldModelConfig

FOLDERS = {"text": "text_encoder", "vae": "vae", "dit": "transformer", "refiner": "refiner"}
ADAPTERS = "refiner_lora"
REFINER_TEXT = "refiner_text"
SHIPPED = Path(__file__).resolve().parent.parent / "weights"


def resolve(config: WorldModelConfig, path: str | Path | None) -> Path:
    """The local folder of `path` (a folder or hf://owner/name), or the one shipped with the preset."""
    if path is None:
        path = SHIPPED / config.name
        if not path.is_dir():
            raise ValueError(f"no weights are shipped for preset {config.name!r}: give a folder or hf://owner/name")
    return local_folder(path)


def config_for(config: WorldModelConfig, folder: Path) -> WorldModelConfig:
    """`config` with what the folder's own configuration says; ValueError when the folder holds another preset."""
    file = folder / "config.json"
    if not file.is_file():
        return config
    try:
        saved = config_from_dict(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the configuration of weights that this version reads: {error}") from None
    if saved.name != config.name:
        raise ValueError(
            f"{folder} holds weights of preset {saved.name!r}, not of {config.name!r}: change one of the two"
        )
    return saved


def config_from_dict(saved: dict) -> WorldModelConfig:
    """The inverse of `dataclasses.asdict` through JSON (lists become the tuples they were)."""

    def freeze(value: Any) -> Any:
        return tuple(freeze(item) for item in value) if isinstance(value, list) else value

    values = {name: freeze(value) for name, value in saved.items()}
    for name, kind in (("sampler", SamplerConfig), ("text", TextConfig), ("refiner", RefinerConfig)):
        values[name] = kind(**{key: freeze(value) for key, value in saved[name].items()})
    values["vae"] = {key: freeze(value) for key, value in saved["vae"].items()}
    return WorldModelConfig(**values)


def digest(folder: Path) -> str:
    """Sixteen hexadecimal digits that name what the folder's safetensors hold."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:16]


def stage1_parts(config: WorldModelConfig) -> tuple[str, ...]:
    """Those trained together as a world model: it, and its text encoder where that is not a frozen one."""
    return ("dit",) if config.text.frozen else ("dit", "text")


def stage1_digests(config: WorldModelConfig, folder: Path) -> list[str]:
    """Of each of `stage1_parts` in a weights folder."""
    return [digest(folder / FOLDERS[part]) for part in stage1_parts(config)]


def save_config(config: WorldModelConfig, folder: Path) -> None:
    """Write `folder/config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def save_part(module: nn.Module, folder: Path, part: str, dtype: torch.dtype) -> None:
    """Write one part's tensors, floating-point ones as `dtype`, into its sub-folder."""
    target = Path(folder) / FOLDERS[part]
    target.mkdir(parents=True, exist_ok=True)
    save_safetensors(_inner(module).state_dict(), target / "model.safetensors", dtype=dtype)


def load_part(module: nn.Module, folder: Path, part: str) -> nn.Module:
    """Load one part's tensors into `module`, strictly; returns it.

    A module on the meta device has no room for data: then the files' headers alone are read and compared with it.
    """
    source = Path(folder) / FOLDERS[part]
    if not source.is_dir():
        raise ValueError(f"{folder} has no {FOLDERS[part]}/: it holds no weights of that part")
    inner = _inner(module)
    own = own_tensors(inner)
    tensors = load_safetensors(source, headers_only=any(tensor.is_meta for tensor in inner.parameters()))
    if part == "refiner":
        tensors = {name: tensor for name, tensor in tensors.items() if name in own or not _is_audio(name)}
    if part == "dit":
        try:
            tensors = convert.to_ours(tensors, module.config)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    load_strict(own, tensors, where=str(source))
    return module


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors under their own names, whether adapters are attached to it or not; without those."""
    state = module.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}


def load_strict(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    """Copy `tensors` into those `expected`; ValueError naming the first missing, extra or wrongly shaped tensor."""
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{where}: tensor {name} is missing")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                f"this model needs {tuple(expected[name].shape)}"
            )
    for name in tensors:
        if name not in expected:
            raise ValueError(f"{where}: tensor {name} does not belong to this model")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])


def _inner(module: nn.Module) -> nn.Module:
    """What a part's file holds: diffusers' own transformer for the refiner, the module itself otherwise."""
    return getattr(module, "transformer", module)


def _is_audio(name: str) -> bool:
    return "audio" in name or "a2v" in name or "v2a" in name or name.startswith("av_cross")

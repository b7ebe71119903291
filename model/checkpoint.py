"""Safetensors files, single or sharded, from a folder or an hf:// id.

A matrix or convolution may lie in 8 bits: int8 under its own name, and under NAME_scale what its rows, output channels,
are multiplied by. It is float32 once loaded.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_SCALE = "_scale"


def local_folder(path: str | Path) -> Path:
    """`path` itself, or where `hf://owner/name[@revision]` lies on this machine after a download through the Hub's
    cache.

    ValueError when there is no such folder or repository.
    """
    text = str(path)
    if not text.startswith("hf://"):
        if not Path(text).is_dir():
            raise ValueError(f"there is no weights folder at {text}: give a folder or hf://owner/name")
        return Path(text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = text.removeprefix("hf://").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{text} cannot be fetched: {str(error).splitlines()[0]}") from None


def load_safetensors(folder: Path, headers_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder: those that its index names, or those of its only .safetensors file.

    headers_only: tensors on the meta device, which have shapes but no data; a file of any size is read in an instant.

    ValueError for no file, several files without an index, a shard that the index names but that is not there, a tensor
    that it places wrongly, and a file that is cut short.
    """
    load = _load_header if headers_only else _load
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not indices:
        if len(files) != 1:
            problem = "no .safetensors file" if not files else f"{len(files)} .safetensors files and no index"
            raise ValueError(f"{folder} has {problem}")
        return load(files[0])
    if len(indices) > 1:
        raise ValueError(f"{folder} has several indices: {', '.join(index.name for index in indices)}")
    try:
        placed: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
    except (ValueError, KeyError):
        raise ValueError(f"{indices[0]} is not an index of shards") from None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder} lacks the shard {shard} that {indices[0].name} names")
        tensors |= load(folder / shard)
    for name in placed:
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is not in the shard {placed[name]}")
    return tensors


def save_safetensors(
    tensors: dict[str, Tensor], file: Path, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None
) -> None:
    """Write one file, floating-point tensors as `dtype`; it appears whole or not at all. As torch.int8, tensors of two
    dimensions or more are rounded to 127 steps of their rows' largest number, and others are float16.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu")
        if not (dtype and tensor.is_floating_point()):
            kept[name] = tensor.contiguous().clone()
        elif dtype == torch.int8 and tensor.ndim > 1:
            kept[name], kept[name + _SCALE] = _rounded(tensor.float())
        else:
            kept[name] = tensor.to(torch.float16 if dtype == torch.int8 else dtype).contiguous().clone()
    partial = file.with_name(f".{file.name}.partial")
    save_file(kept, partial, metadata)
    partial.replace(file)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as int8, and the scale of its rows: x is about their product."""
    scale = x.abs().amax(tuple(range(1, x.ndim)), keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


def _load(file: Path) -> dict[str, Tensor]:
    with _told(file):
        tensors = load_file(file)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and name + _SCALE in tensors]:
        tensors[name] = tensors[name] * tensors.pop(name + _SCALE)
    return tensors


def _load_header(file: Path) -> dict[str, Tensor]:
    with _told(file), safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        scales = {name + _SCALE for name, found in slices.items() if found.get_dtype() == "I8"}
        return {
            name: torch.empty(found.get_shape(), device="meta") for name, found in slices.items() if name not in scales
        }


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a whole safetensors file, fetch it again: {error}") from None

"""State dicts between this package, the official release and diffusers (SANA-WM section 1.13).

Our modules bear the official names. Two official tensors have no counterpart here or there: `pos_embed`, zeros that no
release reads, and for diffusers `y_embedder.y_embedding`, the caption of no text that only training uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.model.config import WorldModelConfig

IGNORED = ("pos_embed",)
_NULL_CAPTION = "y_embedder.y_embedding"
_TO_DIFFUSERS = {"t_embedder.mlp.0.": "t_embedder.linear_1.", "t_embedder.mlp.2.": "t_embedder.linear_2."}


def from_official(
    state_dict: Mapping[str, Tensor | Mapping[str, Tensor]], config: WorldModelConfig
) -> dict[str, Tensor]:
    """Ours from an official state dict, also one inside {"generator": ...} or with names that begin with `model.`.

    ValueError naming a tensor that is missing, extra or of another shape than `config` makes it.
    """
    inner: Any = state_dict.get("generator", state_dict)
    assert isinstance(inner, Mapping)
    stripped = {name.removeprefix("model."): tensor for name, tensor in inner.items()}
    return _checked({name: tensor for name, tensor in stripped.items() if name not in IGNORED}, config)


def from_diffusers(state_dict: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    """Ours from the state dict of diffusers' `SanaWMTransformer3DModel`; the caption of no text becomes zeros."""
    renamed = {_rename(name, {new: old for old, new in _TO_DIFFUSERS.items()}): t for name, t in state_dict.items()}
    like = next(iter(state_dict.values()))
    renamed.setdefault(
        _NULL_CAPTION, torch.zeros(config.text.length, config.text_dim, dtype=like.dtype, device=like.device)
    )
    return _checked(renamed, config)


def to_official(state_dict: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    """An official state dict from ours. The zeros `pos_embed` are left to the official loader, which ignores them."""
    return _checked(dict(state_dict), config)


def to_diffusers(state_dict: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    """The state dict of diffusers' `SanaWMTransformer3DModel` from ours."""
    ours = _checked(dict(state_dict), config)
    return {_rename(name, _TO_DIFFUSERS): tensor for name, tensor in ours.items() if name != _NULL_CAPTION}


def to_ours(state_dict: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    """Ours from whichever of the namings `state_dict` has."""
    if any(name.startswith("t_embedder.linear_1") for name in state_dict):
        return from_diffusers(state_dict, config)
    return from_official(state_dict, config)


def expected_shapes(config: WorldModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a `WorldModel` with this configuration; nothing is allocated."""
    from longtake.model.dit.world_model import WorldModel

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in WorldModel(config).state_dict().items()}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _checked(tensors: dict[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    shapes = expected_shapes(config)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensors[name].shape)}, this model needs {tuple(shape)}")
    for name in tensors:
        if name not in shapes:
            raise ValueError(f"tensor {name} does not belong to this model")
    return tensors

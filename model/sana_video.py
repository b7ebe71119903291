"""A world model that starts from SANA-Video, as SANA-WM itself did (section 4.1, stages 0 and 1).

SANA-Video is read as diffusers writes its `SanaVideoTransformer3DModel`. The two share all of a block but attention,
which is linear in SANA-Video: a GDN whose beta and decay are 1, but for what the delta rule takes off. So that training
begins close to SANA-Video,

  beta and decay start at 0.993 everywhere, as NVlabs' own GDN does; in one trained from nothing they are spread out;
  the camera branch starts with the projections and norms of the main one, and what a camera adds is zero at first;
  short convolutions start as the identity and output gates as 1, which they do in any case.

The patch embedding and the output layer belong to the latents of one autoencoder: they are new unless SANA-Video reads
as many channels, in patches of one. The caption of no text is new, since diffusers leaves it out. Cross attention adds
1e-6 to the squares that it normalises by, as SANA-WM does; diffusers' SANA-Video adds 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longtake.model.checkpoint import load_safetensors
from longtake.model.config import WorldModelConfig
from longtake.model.convert import expected_shapes

if TYPE_CHECKING:
    from longtake.model.dit.world_model import WorldModel

_OF_LATENTS = ("patch_embedding.", "proj_out.")
_BESIDE_BLOCKS = {
    "x_embedder.proj.": ("patch_embedding.",),
    "t_embedder.mlp.0.": ("time_embed.emb.timestep_embedder.linear_1.",),
    "t_embedder.mlp.2.": ("time_embed.emb.timestep_embedder.linear_2.",),
    "t_block.1.": ("time_embed.linear.",),
    "y_embedder.y_proj.fc1.": ("caption_projection.linear_1.",),
    "y_embedder.y_proj.fc2.": ("caption_projection.linear_2.",),
    "attention_y_norm.": ("caption_norm.",),
    "final_layer.linear.": ("proj_out.",),
    "final_layer.scale_shift_table": ("scale_shift_table",),
}
# Several of theirs, one below the other, are one of ours.
_IN_BLOCK = {
    "attn.qkv.": ("attn1.to_q.", "attn1.to_k.", "attn1.to_v."),
    "attn.q_norm.": ("attn1.norm_q.",),
    "attn.k_norm.": ("attn1.norm_k.",),
    "attn.proj.": ("attn1.to_out.0.",),
    "attn.q_proj_cam.weight": ("attn1.to_q.weight",),
    "attn.k_proj_cam.weight": ("attn1.to_k.weight",),
    "attn.v_proj_cam.weight": ("attn1.to_v.weight",),
    "attn.q_norm_cam.": ("attn1.norm_q.",),
    "attn.k_norm_cam.": ("attn1.norm_k.",),
    "cross_attn.q_linear.": ("attn2.to_q.",),
    "cross_attn.kv_linear.": ("attn2.to_k.", "attn2.to_v."),
    "cross_attn.q_norm.": ("attn2.norm_q.",),
    "cross_attn.k_norm.": ("attn2.norm_k.",),
    "cross_attn.proj.": ("attn2.to_out.0.",),
    "mlp.inverted_conv.conv.": ("ff.conv_inverted.",),
    "mlp.depth_conv.conv.": ("ff.conv_depth.",),
    "mlp.point_conv.conv.": ("ff.conv_point.",),
    "mlp.t_conv.": ("ff.conv_temp.",),
    "scale_shift_table": ("scale_shift_table",),
}
_NEAR_LINEAR = {
    "attn.beta_proj.weight": 0.0,
    "attn.beta_proj.bias": 5.0,
    "attn.gate_proj.weight": 0.0,
    "attn.gate_proj.bias": 0.0,
    "attn.A_log": 0.0,
    "attn.dt_bias": -5.0,
    "plucker_proj.bias": 0.0,  # its input is zero at first
}


def find(folder: Path) -> Path | None:
    """The SANA-Video in `folder`: itself or its `transformer/`, where a pipeline has it; None when there is none."""
    return next((place for place in (folder, folder / "transformer") if _saved_config(place)), None)


def from_sana_video(state_dict: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    """What SANA-Video has of our tensors, by our names; the others keep their initialisation.

    ValueError naming a tensor that is missing, unknown, or of another shape than `config` needs.
    """
    shapes = expected_shapes(config)
    sources = {name: group for name in shapes if (group := _sources(name))}
    needed: dict[str, tuple[int, ...]] = {}
    for name, group in sources.items():
        needed |= dict.fromkeys(group, (shapes[name][0] // len(group), *shapes[name][1:]))
    other_latents = False
    for source, shape in needed.items():
        if source not in state_dict:
            raise ValueError(f"tensor {source} of SANA-Video is missing")
        if (found := tuple(state_dict[source].shape)) == shape:
            continue
        if not source.startswith(_OF_LATENTS):
            raise ValueError(f"tensor {source} of SANA-Video has shape {found}, this model needs {shape}")
        other_latents = True
    for name in state_dict:
        if name not in needed:
            raise ValueError(f"tensor {name} does not belong to a SANA-Video that this model can start from")
    return {
        name: torch.cat([state_dict[source] for source in group]) if group[1:] else state_dict[group[0]]
        for name, group in sources.items()
        if not (other_latents and group[0].startswith(_OF_LATENTS))
    }


def account(folder: Path, config: WorldModelConfig) -> str:
    """How much of the SANA-Video in `folder` a world model starts from, and which kinds of tensors are new in it: one
    line. Reads no tensor's data.

    ValueError when its config.json or its tensors are not what `config` needs.
    """
    saved, needed = _saved_config(folder) or {}, _needed_config(config)
    if other := [name for name, value in needed.items() if saved.get(name) != value]:
        has, needs = (", ".join(f"{name} {values.get(name)}" for name in other) for values in (saved, needed))
        raise ValueError(f"{folder} is a SANA-Video of {has}, preset {config.name!r} needs {needs}: change one of them")
    tensors = load_safetensors(folder, headers_only=True)
    taken = from_sana_video(tensors, config)
    used = {source for name in taken for source in _sources(name)}
    old = {_kind(name) for name in taken}
    new = dict.fromkeys(kind for name in expected_shapes(config) if (kind := _kind(name)) not in old)
    return f"{len(used)} of SANA-Video's {len(tensors)} tensors start the world model; new in it are {', '.join(new)}"


def start(model: WorldModel, folder: Path) -> None:
    """Let `model` begin as close to the SANA-Video in `folder` as it can. ValueError as in `from_sana_video`."""
    model.load_state_dict(from_sana_video(load_safetensors(folder), model.config), strict=False)
    for block in model.blocks:
        for name, value in _NEAR_LINEAR.items():
            nn.init.constant_(block.get_parameter(name), value)


def _saved_config(folder: Path) -> dict[str, Any] | None:
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    is_video = isinstance(saved, dict) and saved.get("_class_name") == "SanaVideoTransformer3DModel"
    return saved if is_video else None


def _needed_config(config: WorldModelConfig) -> dict[str, Any]:
    return {
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_cross_attention_heads": config.num_heads,
        "cross_attention_head_dim": config.head_dim,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.text_dim,
        "mlp_ratio": config.mlp_ratio,
    }


def _sources(name: str) -> tuple[str, ...]:
    """SANA-Video's names for what makes up our tensor `name`, or ()."""
    table, place = _BESIDE_BLOCKS, ""
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        table, place = _IN_BLOCK, f"transformer_blocks.{number}."
    for ours, theirs in table.items():
        if name.startswith(ours):
            return tuple(place + each + name.removeprefix(ours) for each in theirs)
    return ()


def _kind(name: str) -> str:
    """The module that a tensor is of, whatever the block."""
    inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
    return inner.removesuffix(".weight").removesuffix(".bias")

"""How far the network is from diffusers' implementation of it, with the same random weights and inputs.

The two share no code; agreement in float32 therefore says that both read the release in the same way. diffusers rounds
queries, keys and values of softmax blocks to bfloat16, so that a last bit of float32 may move a bfloat16 value by 0.4
%; a few 1e-5 of relative error is what is left of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import SanaWMTransformer3DModel
from torch import Tensor

from longtake.model import convert, presets
from longtake.model.camera import CameraFeatures, parse_actions, random_actions
from longtake.model.config import WorldModelConfig
from longtake.model.dit.world_model import WorldModel

LIMIT = 1e-4  # of the relative error
OFFICIAL_TENSORS = 872


def as_diffusers_computes(config: WorldModelConfig) -> WorldModelConfig:
    """The preset with the options of the first release, which diffusers follows."""
    return replace(
        config,
        contractive_gdn=False,
        softmax_dtype="bfloat16",
        ucpe_downscale=True,
        softmax_scale_main="head_dim",
        softmax_scale_camera="padded",
    )


@dataclass(frozen=True)
class Case:
    """One comparison: a network, latent frames, rows, columns, a batch size, with or without a camera."""

    name: str
    config: WorldModelConfig
    frames: int
    height: int
    width: int
    batch: int = 1
    camera: bool = True

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, CameraFeatures | None]:
        """Latents, timesteps, text, mask and camera; a camera of its own for every clip."""
        generator = torch.Generator().manual_seed(seed)
        config, batch = self.config, self.batch
        latents = torch.randn(batch, config.latent_channels, self.frames, self.height, self.width, generator=generator)
        timestep = 1000 * torch.rand(batch, self.frames, generator=generator)
        timestep[:, 0] = 0
        text = torch.randn(batch, config.text.length, config.text_dim, generator=generator)
        mask = torch.rand(batch, config.text.length, generator=generator) < 0.5
        mask[:, 0] = True
        cameras = [self._camera(seed + clip) for clip in range(batch)] if self.camera else []
        return latents, timestep, text, mask, CameraFeatures.cat(cameras) if cameras else None

    def _camera(self, seed: int) -> CameraFeatures:
        stride_t, stride_h, stride_w = self.config.vae_stride
        size, raw = (self.height * stride_h, self.width * stride_w), stride_t * (self.frames - 1) + 1
        trajectory = parse_actions(
            random_actions(max(raw - 1, 8), seed), fov_deg=60 + seed, image_size=size, translation_speed=1
        )
        return trajectory.window(0, raw).features(size, self.config.vae_stride)


def diffusers_model(config: WorldModelConfig, seed: int = 0) -> SanaWMTransformer3DModel:
    """diffusers' network of the same size with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = SanaWMTransformer3DModel(
        in_channels=config.latent_channels,
        num_layers=config.depth,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        softmax_every_n=config.softmax_every,
        linear_head_dim=config.head_dim,
        t_kernel_size=config.temporal_kernel_size,
        conv_kernel_size=config.conv_kernel_size,
        chunk_plucker_channels=config.plucker_channels,
        chunk_plucker_post_attn_blocks=-1,
        caption_channels=config.text_dim,
        mlp_ratio=config.mlp_ratio,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def relative_error(
    case: Case, seed: int = 0, ours: WorldModelConfig | None = None, theirs: WorldModelConfig | None = None
) -> float:
    """|ours - theirs| / |theirs| of one forward pass in float32.

    ours: another configuration for our network (an option of another release). theirs: a configuration of ours to
    compare with in the place of diffusers'.
    """
    model = diffusers_model(case.config, seed)
    tensors = convert.from_diffusers(model.state_dict(), case.config)
    latents, timestep, text, mask, camera = case.inputs(seed)
    if theirs is None:
        kwargs = {} if camera is None else {"camera_conditions": camera.conditions, "chunk_plucker": camera.plucker}
        expected = model(latents, timestep[:, None], text[:, None], mask=mask, return_dict=False, **kwargs)[0]
    else:
        expected = _forward(theirs, tensors, latents, timestep, text, mask, camera)
    found = _forward(ours or case.config, tensors, latents, timestep, text, mask, camera)
    return ((found - expected).norm() / expected.norm()).item()


def account_for_official() -> dict[str, int]:
    """How many tensors and parameters the official file holds, all of them known to us and to diffusers.

    At full size, on the meta device: nothing is allocated. ValueError naming a tensor that only one of the three knows.
    """
    config = presets.get("sana-wm")
    shapes = convert.expected_shapes(config)
    with torch.device("meta"):
        theirs = {name: tensor.shape for name, tensor in SanaWMTransformer3DModel().state_dict().items()}
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    ours = {name: tensor.shape for name, tensor in convert.to_diffusers(tensors, config).items()}
    if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = differing[0]
        raise ValueError(f"tensor {name} is {ours.get(name)} here and {theirs.get(name)} in this version of diffusers")
    count = len(shapes) + len(convert.IGNORED)
    if count != OFFICIAL_TENSORS:
        raise ValueError(f"the network has {count} of the official file's {OFFICIAL_TENSORS} tensors")
    return {"official_tensors": count, "parameters": sum(shape.numel() for shape in ours.values())}


def _forward(config: WorldModelConfig, tensors: dict[str, Tensor], *inputs: object) -> Tensor:
    model = WorldModel(config).eval()
    model.load_state_dict(tensors)
    return model(*inputs)


_TINY = as_diffusers_computes(presets.get("tiny"))
_TRUE_HEADS = replace(_TINY, name="heads of 112", depth=4, hidden_size=224, num_heads=2, head_dim=112)
_WIDE_HEADS = replace(
    _TINY, name="heads of 48", depth=5, hidden_size=144, num_heads=3, head_dim=48, mlp_ratio=3.0, softmax_every=2
)

CASES = (
    Case("tiny_3x6x10_batch2", _TINY, 3, 6, 10, batch=2),
    Case("tiny_5x3x7_batch2_no_camera", _TINY, 5, 3, 7, batch=2, camera=False),
    Case("tiny_11x6x10", _TINY, 11, 6, 10),
    Case("tiny_23x5x3", _TINY, 23, 5, 3),
    Case("head112_1x2x3", _TRUE_HEADS, 1, 2, 3),
    Case("head112_7x5x3_batch2", _TRUE_HEADS, 7, 5, 3, batch=2),
    Case("head112_4x4x4_no_camera", _TRUE_HEADS, 4, 4, 4, camera=False),
    Case("head48_6x3x5", _WIDE_HEADS, 6, 3, 5),
)

"""What a model is, as values: one frozen dataclass binds the network, its autoencoder, text encoder, sampler and
refiner.

A preset (presets.py) is one value of `WorldModelConfig`. Nothing in Longtake asks for a preset's name; everything reads
these fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

SoftmaxScale = Literal["head_dim", "padded"] | float
KeyScale = Literal["tokens", "channels", "none"]
KEY_SCALES: tuple[KeyScale, ...] = get_args(KeyScale)
CameraBranches = Literal["both", "plucker", "ucpe", "none"]


@dataclass(frozen=True)
class SamplerConfig:
    """Flow-matching Euler sampler, bound to the weights it was trained for (SANA-WM section 3).

    shift: time shift s of sigma' = s sigma / (1 + (s - 1) sigma). guidance_scale 1 means one pass without the negative
    prompt. timesteps: of weights distilled to few steps, 1000 sigma before each and, last, 0; they go with no other
    number of steps. chunk_interval: of a chunk-causal model, how much of its steps a chunk is ahead of the next one;
    1 makes them one after another, None all at once. fresh_noise: of a chunk-causal model of few steps, what a step
    takes for clean gets new noise before the next one, as when it was distilled; otherwise the noise stays the same.
    """

    num_steps: int = 60
    shift: float = 9.8
    guidance_scale: float = 5.0
    timesteps: tuple[float, ...] = ()
    chunk_interval: float | None = None
    fresh_noise: bool = False

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if self.timesteps and not (falling and self.timesteps[0] <= 1000 and self.timesteps[-1] == 0):
            raise ValueError(f"timesteps {self.timesteps} must fall from at most 1000 to 0")
        if self.timesteps and self.num_steps != len(self.timesteps) - 1:
            raise ValueError(f"num_steps is {self.num_steps}, but timesteps {self.timesteps} are others: change one")
        if self.chunk_interval is not None and not 0 < self.chunk_interval <= 1:
            raise ValueError(f"chunk_interval is {self.chunk_interval}: it must be more than 0 and at most 1")
        if self.fresh_noise and not self.timesteps:
            raise ValueError("fresh_noise is for weights distilled to few steps: give their timesteps, or leave it out")


@dataclass(frozen=True)
class TextConfig:
    """Text encoder. `gemma` is Gemma-2 through transformers; `bytes` is a small encoder trained with the world model.

    length: tokens kept (the last `length - 1` and the first). prefix: instruction put before every positive prompt.
    """

    kind: Literal["gemma", "bytes"] = "gemma"
    length: int = 300
    dim: int = 2304
    depth: int = 0
    prefix: str = ""
    pretrained: str = ""

    @property
    def frozen(self) -> bool:
        """Whether training reads stored features of captions, instead of training the encoder along."""
        return self.kind == "gemma"


@dataclass(frozen=True)
class RefinerConfig:
    """Second stage, an LTX-2 video transformer (section 3.4).

    sigmas: truncated schedule, the last one is 0. block_size: latent frames refined together, each block after the
    ones before it; None is the whole clip at once. window: of frames that a block sees beside itself: the first of the
    video, and the last refined ones. lora_rank: of the adapters that training puts on a base; 0 trains everything.
    """

    num_layers: int = 48
    num_heads: int = 32
    head_dim: int = 128
    text_dim: int = 3840
    lora_rank: int = 384
    sigmas: tuple[float, ...] = (0.909375, 0.725, 0.421875, 0.0)
    block_size: int | None = None
    window: int = 11
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block_size is not None and (self.block_size < 1 or self.window < 2):
            raise ValueError(
                f"a refiner's block_size {self.block_size} must be at least 1, and its window {self.window} at least 2"
            )
        if self.lora_rank < 0:
            raise ValueError(f"a refiner's lora_rank {self.lora_rank} must be at least 0")


@dataclass(frozen=True)
class WorldModelConfig:
    """One world model. Sizes default to the public 2.66 B release.

    vae: keyword arguments of diffusers' `AutoencoderKLLTX2Video`. vae_stride: (frames, rows, columns) of pixels a
    latent. image_size: (height, width) in pixels that the weights were trained at.

    Fields for the differences between the public releases: ucpe_downscale: scale camera-branch queries, keys and values
      back to their RMS before UCPE (first release). softmax_scale_main, softmax_scale_camera: "head_dim" is
      1/sqrt(head_dim); "padded" is 1/sqrt(the head dim padded to 128
        or 256 unless it is 32, 64, 128 or 256), as releases that pad for flash attention compute it; a number is the
        scale.
      softmax_dtype: what queries, keys and values of softmax blocks are rounded to; all releases round to bfloat16.
        float8_e4m3fn is faster on Hopper, and off by some 5 percent: for generation alone.
      key_map: which keys the action language means (camera/actions.py).

    chunk_causal: the weights see their own chunk of `chunk_size` latent frames and earlier ones, and no later ones.
    chunk_window: how many chunks before its own softmax attention then sees beside the first; None is all.

    camera_branches: what the network reads of a camera (sections 1.8 and 1.9): Pluecker maps, added in every block,
      "plucker"; attention in ray coordinates, "ucpe"; "both" or "none". Weights of what is left out stay unused.

    key_scale: of the GDN's keys, over D channels a head and S tokens a frame: "tokens" is 1/sqrt(D S). "channels",
      1/sqrt(D), and "none" are what `study-stability` compares it with.
    contractive_gdn: divide beta by a frame's sum of beta |k|^2 where that exceeds 1, so that no frame can make the
      GDN's state grow, however long the video. The releases leave that to training: their keys are normalised over all
      heads, which bounds the sum on average but lets it reach the number of heads in one.
    """

    name: str = "sana-wm"
    depth: int = 20
    hidden_size: int = 2240
    num_heads: int = 20
    head_dim: int = 112
    latent_channels: int = 128
    text_dim: int = 2304
    softmax_every: int = 4
    mlp_ratio: float = 3.0
    conv_kernel_size: int = 4
    temporal_kernel_size: int = 3
    chunk_size: int = 3
    chunk_causal: bool = False
    chunk_window: int | None = None
    plucker_channels: int = 48
    max_latent_frames: int = 1024
    ucpe_downscale: bool = True
    softmax_scale_main: SoftmaxScale = "head_dim"
    softmax_scale_camera: SoftmaxScale = "padded"
    softmax_dtype: Literal["bfloat16", "float32", "float8_e4m3fn"] = "bfloat16"
    key_map: str = "official"
    camera_branches: CameraBranches = "both"
    key_scale: KeyScale = "tokens"
    contractive_gdn: bool = False
    image_size: tuple[int, int] = (704, 1280)
    vae_stride: tuple[int, int, int] = (8, 32, 32)
    fps: float = 16.0
    sampler: SamplerConfig = SamplerConfig()
    text: TextConfig = TextConfig()
    refiner: RefinerConfig = RefinerConfig()
    vae: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads x head_dim = {self.num_heads} x {self.head_dim} = "
                f"{self.num_heads * self.head_dim}: change one of the three"
            )
        if self.head_dim % 8:
            raise ValueError(
                f"head_dim {self.head_dim} must be a multiple of 8: UCPE acts on groups of 4 in half a head"
            )
        if self.plucker_channels != 6 * self.vae_stride[0]:
            raise ValueError(
                f"plucker_channels {self.plucker_channels} must be 6 x the VAE's temporal stride {self.vae_stride[0]}"
            )
        if self.key_scale not in KEY_SCALES:
            raise ValueError(f"key_scale {self.key_scale!r} must be one of {', '.join(KEY_SCALES)}")
        if self.camera_branches not in (known := get_args(CameraBranches)):
            raise ValueError(f"camera_branches {self.camera_branches!r} must be one of {', '.join(known)}")

    @property
    def reads_plucker(self) -> bool:
        return self.camera_branches in ("both", "plucker")

    @property
    def reads_rays(self) -> bool:
        return self.camera_branches in ("both", "ucpe")

    @property
    def refiner_reads_own_text(self) -> bool:
        """Whether the second stage has a text encoder of its own, beside the first's."""
        return self.refiner.text_dim != self.text_dim

    @property
    def frames_per_chunk(self) -> int:
        """Raw frames of a chunk; the first one has one more, the image."""
        return self.vae_stride[0] * self.chunk_size

    @property
    def most_latent_frames(self) -> int | None:
        """Of a video; None where it may go on for ever, as chunks do that see no more than a window of others."""
        return None if self.chunk_causal and self.chunk_window is not None else self.max_latent_frames

    def latent_frames(self, frames: int) -> int:
        """How many latent frames hold `frames` raw ones; the first holds one alone."""
        return (frames - 1) // self.vae_stride[0] + 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of a latent frame."""
        _, stride_h, stride_w = self.vae_stride
        height, width = self.image_size
        return height // stride_h, width // stride_w

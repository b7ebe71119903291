"""What every Triton kernel here needs to be launched: sizes of tiles, precision of products, and whether to use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

_use_triton = os.environ.get("LONGTAKE_KERNELS") == "triton"


def fused(*tensors: Tensor) -> bool:
    """Whether these go through Triton: on a GPU, with LONGTAKE_KERNELS=triton. Otherwise the definitions run."""
    return _use_triton and all(tensor.is_cuda for tensor in tensors)


def reason() -> str:
    """Which of the two runs here, in a line."""
    if not torch.cuda.is_available():
        return "definitions in torch: Triton needs a GPU"
    if not _use_triton:
        return "definitions in torch: LONGTAKE_KERNELS=triton chooses Triton"
    return "Triton: LONGTAKE_KERNELS=triton"


@contextlib.contextmanager
def kernels(triton: bool) -> Iterator[None]:
    """While this lasts, use Triton on GPUs, or the definitions everywhere."""
    global _use_triton
    before, _use_triton = _use_triton, triton
    try:
        yield
    finally:
        _use_triton = before


def padded(size: int) -> int:
    """The next power of 2, at least 16: what a tile of a tensor-core product has to measure."""
    return max(16, 1 << (size - 1).bit_length())


def tile(tokens: int, width: int, element_size: int) -> int:
    """Tokens a tile of `width` channels, so that two tiles and their successors stay within 48 KB."""
    most = 48 * 1024 // (2 * width * element_size)
    return max(16, min(64, padded(tokens), 1 << (most.bit_length() - 1)))


def warps(block_d: int) -> int:
    """For programs that keep matrices of block_d x block_d in registers: 64 numbers a thread of each."""
    return max(1, min(8, block_d * block_d // 2048))


def precision_of(x: Tensor) -> str:
    """How float32 products are computed, as torch's own are asked to be."""
    return "tf32" if x.is_cuda and torch.get_float32_matmul_precision() != "highest" else "ieee"


def contiguous_tokens(x: Tensor) -> Tensor:
    """x (B, T, S, ...) such that a token is `x.stride(2)` after the last one, over all frames and clips, and its last
    channels lie together; no copy for a part of a wider projection.
    """
    b, t, s = x.shape[:3]
    token = x.stride(2)
    regular = x.stride(-1) == 1 and (t == 1 or x.stride(1) == s * token) and (b == 1 or x.stride(0) == t * s * token)
    return x if regular else x.contiguous()

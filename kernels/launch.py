"""What every Triton kernel here needs to be launched: sizes of tiles, precision of products, and whether to use it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_for_a_while: bool | None = None  # what `kernels` says
_TRITON_HERE = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


# Held by who waits for a whole GPU, and by who captures launches, which does not go together.
gpu_alone = threading.Lock()


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what definitions compute in."""
    return x if x.dtype == torch.float64 else x.float()


def fused(*tensors: Tensor) -> bool:
    """Whether these go through Triton: on an NVIDIA GPU, unless LONGTAKE_KERNELS=definitions asks for the definitions,
    or torch.compile fuses those itself.
    """
    if torch.compiler.is_compiling() or not (_wanted() and _TRITON_HERE):
        return False
    return all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)


# As torch.compiler.disable, which imports the compiler at once: 1.5 s of every process.
uncompiled: Any = torch._disable_dynamo


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args) with the first argument's GPU as the current one, where Triton launches."""
    with torch.cuda.device_of(args[0]):
        return function.apply(*args)


def reason() -> str:
    """Which of the two runs here, in a line."""
    if not _wanted():
        return "definitions in torch: LONGTAKE_KERNELS=definitions asks for them"
    if not (torch.cuda.is_available() and _TRITON_HERE):
        return "definitions in torch: Triton needs an NVIDIA GPU, and to be installed"
    return "Triton; the GDN's products of float32 in torch"


@contextlib.contextmanager
def kernels(triton: bool) -> Iterator[None]:
    """While this lasts, use Triton on GPUs, or the definitions everywhere."""
    global _for_a_while
    before, _for_a_while = _for_a_while, triton
    try:
        yield
    finally:
        _for_a_while = before


def _wanted() -> bool:
    return _by_environment() if _for_a_while is None else _for_a_while


@functools.cache
def _by_environment() -> bool:
    chosen = os.environ.get("LONGTAKE_KERNELS", "triton")
    if chosen not in ("triton", "definitions"):
        raise ValueError(f"LONGTAKE_KERNELS={chosen}: choose triton (the default on a GPU) or definitions")
    return chosen == "triton"


def padded(size: int) -> int:
    """The next power of 2, at least 16: what a tile of a tensor-core product has to measure."""
    return max(16, 1 << (size - 1).bit_length())


def tile(tokens: int, width: int, element_size: int) -> int:
    """Tokens a tile of `width` channels: 64, which tensor cores want, or fewer of float32, whose products keep more."""
    most = 2**16 // (width * element_size**2)
    return max(16, min(64, padded(tokens), 1 << (most.bit_length() - 1)))


def roomy(x: Tensor) -> bool:
    """Whether a program has the shared memory of an A100 or H100 (163 and 227 KB) and not the 99 KB of smaller GPUs."""
    return not x.is_cuda or _shared_memory(x.device) > 128 * 1024


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def warps(block_d: int) -> int:
    """For programs that keep matrices of block_d x block_d in registers: 64 numbers a thread of each."""
    return max(1, min(8, block_d * block_d // 2048))


def precision() -> str:
    """How float32 products are computed, as torch's own are asked to be."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def contiguous_tokens(x: Tensor) -> Tensor:
    """x (B, T, S, ...) such that a token is `x.stride(2)` after the last one, over all frames and clips, and its last
    channels lie together; no copy for a part of a wider projection.
    """
    b, t, s = x.shape[:3]
    token = x.stride(2)
    regular = x.stride(-1) == 1 and (t == 1 or x.stride(1) == s * token) and (b == 1 or x.stride(0) == t * s * token)
    return x if regular else x.contiguous()


def even_rows(x: Tensor) -> Tensor:
    """x (B, N, C), copied unless its channels lie together and all tokens evenly, as in a part of a product."""
    even = x.stride(2) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


def by_token(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, S, H, D), copied unless heads follow one another and tokens lie evenly; and how far these are apart."""
    x = contiguous_tokens(x)
    x = x if x.stride(3) == x.shape[4] else x.contiguous()
    return x, x.stride(2)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where it is not `in_sixteens`, as the memory accelerator wants it."""
    return x if in_sixteens(x) else x.clone(memory_format=torch.contiguous_format)


def in_sixteens(x: Tensor) -> bool:
    """Whether the rows of x lie together, and begin at multiples of 16 bytes, in its storage as well."""
    steps = x.storage_offset(), *x.stride()[:-1]
    fit = all(x.stride()[:-1]) and all(step * x.element_size() % 16 == 0 for step in steps)
    return fit and x.stride(-1) == 1 and x.data_ptr() % 16 == 0

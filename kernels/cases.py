"""Every fused operator with inputs of a size, to be timed beside its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longtake.kernels.gdn import bidirectional_states, frame_maps, read
from longtake.kernels.glu_conv import glu_conv
from longtake.kernels.modulate import gated, modulate, output_gate
from longtake.kernels.short_conv import short_conv
from longtake.kernels.ucpe import encode


def cases(
    frames: int, grid: tuple[int, int], heads: int, channels: int, inner: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, work, and the bytes that the work has to move: inputs read once, outputs written once.

    A clip of `frames` latent frames of a (rows, columns) grid; `inner` channels in the feed-forward.
    """
    tokens, size = grid[0] * grid[1], heads * channels

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, y, z = (randn(1, frames * tokens, size) for _ in range(3))
    shift, scale, gate = randn(1, frames, 3, size).chunk(3, dim=2)
    yield "modulate", lambda: modulate(x, shift, scale), _bytes(x, x)
    yield "gated", lambda: gated(x, gate, y, z), _bytes(x, x, x, x)
    yield "output_gate", lambda: output_gate(x, y, z), _bytes(x, x, x, x)
    taps = randn(size, 1, 4)
    yield "short_conv", lambda: short_conv(x.unflatten(1, (frames, -1)), taps), _bytes(x, x)
    by_head = x.unflatten(-1, (heads, channels))
    rope, camera_rope = (torch.randn(frames * tokens, channels // n, 2, device=device) for n in (2, 4))
    matrix, weight = torch.randn(1, frames * tokens, 4, 4, device=device), randn(size)
    yield "encode_main", lambda: encode(by_head, rope, weight, relu=True, plain=True), _bytes(x, x, x, rope)
    rays = {"matrix": matrix, "downscale": True, "inflation": True}
    inflation = x[..., : 2 * heads]  # as many bytes as its float32
    work = lambda: encode(by_head, camera_rope, weight, relu=True, **rays)  # noqa: E731
    yield "encode_camera", work, _bytes(x, x, matrix, camera_rope, inflation)
    q, k, v = (tensor.view(1, frames, tokens, heads, channels) for tensor in (x, y, z))
    k = (k.relu() * (tokens * channels) ** -0.5).contiguous()
    beta, decay = torch.rand(1, frames, tokens, heads, device=device), torch.rand(1, frames, heads, device=device)
    maps = frame_maps(k, v, beta, decay)
    yield "frame_maps", lambda: frame_maps(k, v, beta, decay), _bytes(k, v, *maps)
    yield "bidirectional_states", lambda: bidirectional_states(*maps), _bytes(*maps, maps[1])
    states, mass = bidirectional_states(*maps), maps[1][..., 0, :].contiguous()
    yield "read", lambda: read(q, states, k, mass), _bytes(q, k, q, states)
    wide, kernel, bias = randn(frames, *grid, 2 * inner), randn(2 * inner, 1, 3, 3), randn(2 * inner)
    yield "glu_conv", lambda: glu_conv(wide, kernel, bias), 3 * _bytes(wide) // 2


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""Softmax attention for Hopper in Triton's Gluon, forward only: one warp loads, groups of four warps compute.

Each group has 64 queries. While the tensor cores multiply the weights of a tile of keys with its values, the group
takes the exponentials of the next tile's scores; and while one group does so, the tensor cores work for the others.

The last tile of keys comes first, so that only the step before the loop has to mask. A stage of the ring holds the keys
of a step and the values of the step before; beyond the tokens' ends the memory accelerator fills in zeros.

A program fills a multiprocessor. Tiles of queries that would make up a last, partly filled round of them are cut along
the keys into parts, one for each multiprocessor; a second kernel joins the parts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longtake.kernels.attention.float8 import quantized
from longtake.kernels.launch import aligned, padded

_ROWS = gl.constexpr(64)  # queries of a group: what a wgmma instruction takes
_GROUPS = gl.constexpr(2)  # with three, each has too few registers for 128 keys
_SHIFT = gl.constexpr(8)  # weights of softmax are held in float8 times 2**8: at most 256 of 448
_TILE = 128  # queries of a program
_LEAST_TILES = 4  # of keys in a part
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@dataclass(frozen=True)
class Ring:
    """Keys a tile, tiles in flight, whether groups take turns at the tensor cores."""

    keys: int = 128
    stages: int = 3
    turns: bool = True


EXACT = Ring()
FLOAT8 = Ring(stages=4, turns=False)


@gluon.jit
def _load(q_ref, k_ref, v_ref, memory, barriers, place, FLOAT8: gl.constexpr):
    q_tiles, k_tiles, v_tiles, out_tiles = memory
    q_full, full, empty, turns = barriers
    b, h, first, tiles, end = place
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_ref.block_shape[2]
    mbarrier.expect(q_full, _GROUPS * q_ref.block_type.nbytes)
    for group in gl.static_range(_GROUPS):
        tma.async_copy_global_to_shared(q_ref, [b, h, first + group * _ROWS, 0], q_full, q_tiles.index(group))
    for step in range(tiles + 1):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), k_ref.block_type.nbytes + v_ref.block_type.nbytes)
        at = (end - step) * BLOCK_N
        tma.async_copy_global_to_shared(k_ref, [b, h, at - BLOCK_N, 0], full.index(stage), k_tiles.index(stage))
        if FLOAT8:
            tma.async_copy_global_to_shared(v_ref, [b, h, 0, at], full.index(stage), v_tiles.index(stage))
        else:
            tma.async_copy_global_to_shared(v_ref, [b, h, at, 0], full.index(stage), v_tiles.index(stage))


@gluon.jit
def _matrix(tiles, i):
    return tiles.index(i).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.constexpr_function
def _parts(channels, least):
    """Where powers of 2 begin, and which, that make up the channels: 112 are 64, 32 and 16."""
    steps = (channels + least - 1) // least
    sizes = [least << bit for bit in reversed(range(steps.bit_length())) if steps >> bit & 1]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


@gluon.jit
def _scores(q, k, into, HEAD: gl.constexpr):
    """Begin to overwrite `into` with q k^T."""
    PARTS: gl.constexpr = _parts(HEAD, 256 // q.dtype.primitive_bitwidth)
    for i in gl.static_range(len(PARTS)):
        q_part = q.slice(PARTS[i][0], PARTS[i][1], 1)
        k_part = k.slice(PARTS[i][0], PARTS[i][1], 1)
        into = warpgroup_mma(q_part, k_part.permute((1, 0)), into, use_acc=i > 0, is_async=True)
    return into


@gluon.jit
def _softmax(scores, scale, total, top, SHIFT: gl.constexpr):
    """2**SHIFT times the weights of a tile, what earlier sums shrink by, and the sum and the maximum so far."""
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - (higher - SHIFT)[:, None])
    shrink = gl.exp2(top - higher)
    return weights, shrink, total * shrink + gl.sum(weights, 1), higher


@gluon.jit
def _exact(
    q, k_tiles, v_tiles, full, empty, turns, tiles, group, scale, scores, total, top, out, HEAD: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """From the first tile's scores to all weights times values, the sum of the weights, and the largest score."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    P: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 2)
    weights, shrink, total, top = _softmax(scores, scale, total, top, 0)
    p = gl.convert_layout(weights.to(v_tiles.dtype), P)
    mbarrier.wait(full.index(1), 0)
    for step in range(1, tiles):
        stage = step % STAGES
        if TURNS:
            mbarrier.wait(turns.index(group), step & 1 ^ 1)
        scores = _scores(q, _matrix(k_tiles, stage), scores, HEAD)
        out = warpgroup_mma(p, _matrix(v_tiles, stage), out, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index((group + 1) % turns.shape[0]), count=1)
        scores = warpgroup_mma_wait(1, [scores])
        weights, shrink, total, top = _softmax(scores, scale, total, top, 0)
        # Waiting for the next tile here, in a loop, keeps the compiler from moving the exponentials past what follows.
        mbarrier.wait(full.index((step + 1) % STAGES), (step + 1) // STAGES & 1)
        out, spent, p = warpgroup_mma_wait(0, [out, p, gl.convert_layout(weights.to(v_tiles.dtype), P)])
        mbarrier.arrive(empty.index(stage), count=1)
        out *= gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return warpgroup_mma(p, _matrix(v_tiles, tiles % STAGES), out), total, top


@gluon.jit
def _float8(
    q, k_tiles, v_tiles, full, empty, turns, tiles, group, scale, scores, total, top, out, HEAD: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """As `_exact`, but a group's own exponentials and products do not overlap, to hold the weights in few registers."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    P: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 4)
    M: gl.constexpr = scores.shape[0]
    N: gl.constexpr = scores.shape[1]
    part = out
    for step in range(1, tiles + 1):
        stage = step % STAGES
        weights, shrink, total, top = _softmax(scores, scale, total, top, _SHIFT)
        p = weights.to(v_tiles.dtype)
        p = p.reshape([M, N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([M, N])
        p = gl.convert_layout(p, P)  # a thread now needs the columns that it has
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if TURNS:
            mbarrier.wait(turns.index(group), step & 1 ^ 1)
        # The tensor core sums float8 products in less than float32: one tile at most.
        part = warpgroup_mma(p, _matrix(v_tiles, stage).permute((1, 0)), part, use_acc=False, is_async=True)
        scores = _scores(q, _matrix(k_tiles, stage), scores, HEAD)
        if TURNS:
            mbarrier.arrive(turns.index((group + 1) % turns.shape[0]), count=1)
        part = warpgroup_mma_wait(1, [part])
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None] + part
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(empty.index(stage), count=1)
    return out, total, top


@gluon.jit
def _compute(
    out_ref, memory, barriers, place, numbers, parts, group, HEAD: gl.constexpr, TURNS: gl.constexpr,
    FLOAT8: gl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles, v_tiles, out_tiles = memory
    q_full, full, empty, turns = barriers
    b, h, first, tiles, end = place
    scale, keys, v_scales_ptr = numbers
    part, part_ptr, top_ptr = parts
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    BLOCK_D: gl.constexpr = k_tiles.shape[4]
    STEP: gl.constexpr = 256 // q_tiles.dtype.primitive_bitwidth
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, STEP])
    OF_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, STEP])
    mbarrier.wait(q_full, 0)
    q = _matrix(q_tiles, group)
    mbarrier.wait(full.index(0), 0)
    scores = _scores(q, _matrix(k_tiles, 0), gl.zeros([_ROWS, BLOCK_N], gl.float32, OF_SCORES), HEAD)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(empty.index(0), count=1)
    n = (end - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, OF_SCORES))
    scores = gl.where((n < keys)[None, :], scores, float("-inf"))
    total = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, OF_SCORES))
    top = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, OF_SCORES))
    out = gl.zeros([_ROWS, BLOCK_D], gl.float32, OF_OUT)
    if FLOAT8:
        out, total, top = _float8(
            q, k_tiles, v_tiles, full, empty, turns, tiles, group, scale, scores, total, top, out, HEAD, TURNS
        )
        d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OF_OUT))
        out *= gl.load(v_scales_ptr + d, d < HEAD, 0.0)[None, :]
    else:
        out, total, top = _exact(
            q, k_tiles, v_tiles, full, empty, turns, tiles, group, scale, scores, total, top, out, HEAD, TURNS
        )
    out *= gl.convert_layout(1 / total, gl.SliceLayout(1, OF_OUT))[:, None]
    if part < 0:
        _matrix(out_tiles, group).store(out.to(out_tiles.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_ref, [b, h, first + group * _ROWS, 0], out_tiles.index(group))
        tma.store_wait(0)
    else:
        row = (part * _GROUPS + group) * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, OF_OUT))
        column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OF_OUT))
        gl.store(part_ptr + row[:, None] * BLOCK_D + column[None, :], out)
        gl.store(top_ptr + row, gl.convert_layout(top + gl.log2(total), gl.SliceLayout(1, OF_OUT)))


@gluon.jit(do_not_specialize=["rows", "whole", "pieces"])
def _attend(
    q_ref, k_ref, v_ref, out_ref, part_ptr, top_ptr, scales_ptr, v_scales_ptr, scale, keys, heads, rows, whole, pieces,
    HEAD: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, FLOAT8: gl.constexpr,
):  # fmt: skip
    """out (B, H, N, D) by descriptors of q, k, v; `scale` is in powers of 2. In float8 v is (B, H, D, N), and its
    channels' scales and those of the scores are applied here.

    Of the tiles of queries, `rows` a head, the first `whole` are a program's each; of the others each is cut into
    `pieces` along the keys, whose results, and the logarithms of whose sums of weights, go to part_ptr and top_ptr.
    """
    number = gl.program_id(0)
    tiles = gl.cdiv(keys, k_ref.block_shape[2])
    part, end = number - whole, tiles
    if part >= 0:
        number = whole + part // pieces
        piece = part % pieces
        end = (piece + 1) * tiles // pieces
        tiles = end - piece * tiles // pieces
    head = number // rows
    b, h = head // heads, head % heads
    first = number % rows * _GROUPS * _ROWS
    q_tiles = gl.allocate_shared_memory(q_ref.dtype, [_GROUPS] + q_ref.block_shape, q_ref.layout)
    k_tiles = gl.allocate_shared_memory(k_ref.dtype, [STAGES] + k_ref.block_shape, k_ref.layout)
    v_tiles = gl.allocate_shared_memory(v_ref.dtype, [STAGES] + v_ref.block_shape, v_ref.layout)
    if FLOAT8:
        out_tiles = gl.allocate_shared_memory(out_ref.dtype, [_GROUPS] + out_ref.block_shape, out_ref.layout)
        scale *= gl.load(scales_ptr + head)
        v_scales_ptr += head * HEAD
    else:
        out_tiles = q_tiles
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [_GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), _GROUPS)
    for group in gl.static_range(_GROUPS):
        mbarrier.init(turns.index(group), 1)
    mbarrier.arrive(turns.index(0), count=1)
    fence_async_shared()
    memory, barriers = (q_tiles, k_tiles, v_tiles, out_tiles), (q_full, full, empty, turns)
    place, numbers, parts = (b, h, first, tiles, end), (scale, keys, v_scales_ptr), (part, part_ptr, top_ptr)
    gl.warp_specialize(
        [
            (_compute, (out_ref, memory, barriers, place, numbers, parts, 0, HEAD, TURNS, FLOAT8)),
            (_compute, (out_ref, memory, barriers, place, numbers, parts, 1, HEAD, TURNS, FLOAT8)),
            (_load, (q_ref, k_ref, v_ref, memory, barriers, place, FLOAT8)),
        ],
        [4, 1],  # warps and registers of all but the first
        [240, 24],
    )


@triton.jit(do_not_specialize=["whole", "pieces", "rows"])
def _join(
    part_ptr, top_ptr, out_ptr, tokens, heads, rows, whole, pieces, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, D) of some rows of a tile that was cut into pieces."""
    number = whole + tl.program_id(0)
    head, r = number // rows, tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d, at = tl.arange(0, BLOCK_D), tl.program_id(0) * pieces * TILE + r
    total, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for piece in range(pieces):
        own = tl.load(top_ptr + at + piece * TILE)
        higher = tl.maximum(top, own)
        shrink, weight = tl.exp2(top - higher), tl.exp2(own - higher)
        part = tl.load(part_ptr + (at + piece * TILE)[:, None] * BLOCK_D + d[None, :])
        out = out * shrink[:, None] + part * weight[:, None]
        total, top = total * shrink + weight, higher
    token = number % rows * TILE + r
    to = ((head // heads).to(tl.int64) * tokens + token) * heads + head % heads
    inside = (token < tokens)[:, None] & (d < HEAD)[None, :]
    tl.store(out_ptr + to[:, None] * HEAD + d[None, :], (out / total[:, None]).to(out_ptr.dtype.element_ty), inside)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, ring: Ring = EXACT) -> Tensor:
    """softmax(q k^T scale) v: q (B, N, H, D), k and v (B, M, H, D) of one dtype of 16 bits, D a multiple of 8 and at
    most 128, a positive scale; no gradient.
    """
    q, k, v = (aligned(x.transpose(1, 2)) for x in (q, k, v))
    return _launch(q, k, v, None, None, scale, q.dtype, ring)


def attend_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float, ring: Ring = FLOAT8) -> Tensor:
    """About `attend`, with all factors rounded to float8_e4m3fn: 3 bits of mantissa; D a multiple of 16."""
    q8, k8, v8, scales, v_scales = quantized(q, k, v)
    v8 = v8.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)  # as `_float8` orders the weights
    return _launch(q8, k8, v8, scales, v_scales, scale, q.dtype, ring)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, v_scales: Tensor | None, scale: float, dtype: torch.dtype,
    ring: Ring,
) -> Tensor:  # fmt: skip
    """(B, N, H, D) of factors with the heads before the tokens."""
    b, h, n, d = q.shape
    if k.shape[:2] != (b, h):
        raise ValueError(f"keys of {tuple(k.shape[:2])} clips and heads do not fit queries of {(b, h)}")
    if d * q.element_size() % 16 or d > 128:
        raise ValueError(f"a head of {d} channels is not a multiple of 16 bytes, or above 128: use torch's attention")
    is_float8 = scales is not None
    block_d = max(padded(d), 32 if is_float8 else 16)
    out = torch.empty(b, n, h, d, dtype=dtype, device=q.device)
    refs = []
    for x, block in (
        (q, [64, block_d]),
        (k, [ring.keys, block_d]),
        (v, [block_d, ring.keys] if is_float8 else [ring.keys, block_d]),
        (out.transpose(1, 2), [64, block_d]),
    ):
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, *block], _DTYPES[x.dtype])
        refs.append(TensorDescriptor.from_tensor(x, [1, 1, *block], layout))
    rows = triton.cdiv(n, _TILE)
    whole, rest, pieces = _rounds(rows * b * h, triton.cdiv(k.shape[2], ring.keys), _multiprocessors(q.device))
    parts = torch.empty(rest * pieces, _TILE, block_d, device=q.device)
    tops = torch.empty(rest * pieces, _TILE, device=q.device)
    _attend[whole + rest * pieces,](
        *refs, parts, tops, scales, v_scales, scale * math.log2(math.e), k.shape[2], h, rows, whole, pieces, d,
        ring.stages, ring.turns, is_float8, num_warps=4,
    )  # fmt: skip
    if rest:
        _join[rest, _TILE // 16](parts, tops, out, n, h, rows, whole, pieces, d, block_d, _TILE, 16)
    return out


def _rounds(tiles: int, key_tiles: int, multiprocessors: int) -> tuple[int, int, int]:
    """How many tiles of queries are a program's each, how many are left, and into how many pieces each of these is
    cut.
    """
    rest = tiles % multiprocessors
    pieces = min(multiprocessors // rest, key_tiles // _LEAST_TILES) if rest else 0
    return (tiles - rest, rest, pieces) if pieces > 1 else (tiles, 0, 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

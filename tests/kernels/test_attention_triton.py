"""Our attentions against softmax written out, at lengths that no tile divides and in memory full of NaN."""

import pytest
import torch

from longtake.kernels.attention import attend_float8, attend_masked, float8, triton_hopper, triton_masked
from longtake.kernels.attention.triton_hopper import Ring

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
here = pytest.mark.gpu if CUDA else pytest.mark.cpu

hopper = pytest.mark.skipif(not HOPPER, reason="a kernel for compute capability 9")
RINGS = [triton_hopper.EXACT, Ring(64, 4), Ring(128, 2, turns=False)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def softmax_attention(q, k, v, scale):
    q, k, v = (x.double() for x in (q, k, v))
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1), v)


def randn(*sizes, device, dtype, seed):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(found, true):
    return float((found.double() - true).norm() / true.norm())


@here
@pytest.mark.parametrize(("n", "m", "h", "d"), [(33, 50, 2, 112), (1, 1, 1, 8), (130, 130, 1, 16)])
def test_some_keys_are_not_seen(device, n, m, h, d):
    dtype = torch.bfloat16 if CUDA else torch.float16  # the interpreter is wrong in bfloat16
    q, v = (randn(2, t, h, d, device=device, dtype=dtype, seed=t) for t in (n, m))
    k = randn(2, h, m, d, device=device, dtype=dtype, seed=1).transpose(1, 2) + 1
    mask = torch.zeros(2, m, device=device, dtype=dtype)
    mask[1, m // 3 :] = -torch.inf
    mask[0, : m // 2] = -torch.inf  # more than the first tile
    mask[:, 0] = 0.5
    true = attend_masked(q.double(), k.double(), v.double(), 0.3, mask.double())
    found = triton_masked.attend(q, k, v, 0.3, mask)
    assert found.dtype == dtype and error(found, true) < TOLERANCE[dtype]
    if m > 1:
        mask[0, : m - 1] = -torch.inf
        torch.testing.assert_close(triton_masked.attend(q, k, v, 0.3, mask)[0], v[0, -1:].expand(n, -1, -1))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize(
    ("b", "n", "m", "h", "d"),
    [
        (2, 33, 50, 2, 112),  # a part of a tile is left of queries and of keys
        (1, 128, 256, 3, 16),  # none is left
        (1, 130, 389, 1, 112),
        (1, 1, 1, 1, 112),
        (1, 5, 3, 2, 8),
        (1, 300, 1200, 2, 112),  # keys of all tiles in parts
        (1, 140, 1100, 70, 128),  # whole tiles, and parts
    ],
)
def test_attention_is_exact(device, b, n, m, h, d, ring, dtype):
    q, k, v = (randn(b, t, h, d, device=device, dtype=dtype, seed=t + i) for i, t in enumerate((n, m, m)))
    q, k = 3 * q, k + 1  # some weights near 1
    found = triton_hopper.attend(q, k, v, d**-0.5, ring)
    assert (found.shape, found.dtype) == (q.shape, dtype)
    assert error(found, softmax_attention(q, k, v, d**-0.5)) < TOLERANCE[dtype]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("channels", [112, 124])  # a row of 124 channels is no multiple of 16 bytes
def test_inputs_may_be_parts_of_a_wider_tensor(device, channels, b):
    wide = torch.full((b, 40, 3, 3, channels), float("nan"), device=device, dtype=torch.float16)
    wide[:, :35, :, :2, :96] = randn(b, 35, 3, 2, 96, device=device, dtype=torch.float16, seed=0)
    q, k, v = wide[:, :35, :, :2, :96].unbind(2)
    assert error(triton_hopper.attend(q, k, v, 0.1), softmax_attention(q, k, v, 0.1)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@hopper
def test_strides_of_one_batch_or_head_do_not_matter(device):
    q, k, v = (randn(1, 20, 1, 16, device=device, dtype=torch.float16, seed=seed) for seed in range(3))
    odd_q, odd_k, odd_v = (x.as_strided(x.shape, (321, 16, 3, 1)) for x in (q, k, v))
    found = triton_hopper.attend(odd_q, odd_k, odd_v, 0.3)
    assert error(found, softmax_attention(q, k, v, 0.3)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("order", [-1, 1])
def test_large_scores_do_not_overflow(device, order):
    q, k, v = (randn(1, 300, 1, 16, device=device, dtype=torch.float16, seed=seed) for seed in range(3))
    q[..., 0] = 100
    k[..., 0] = (
        torch.arange(300, device=device)[None, :, None] * order / 64
    )  # the largest score is the last or the first
    assert error(triton_hopper.attend(q, k, v, 1.0), softmax_attention(q, k, v, 1.0)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@hopper
def test_a_head_that_the_accelerator_cannot_load_is_refused(device):
    q, k, v = (torch.zeros(1, 2, 1, 12, device=device, dtype=torch.float16) for _ in range(3))
    with pytest.raises(ValueError, match="12 channels"):
        triton_hopper.attend(q, k, v, 1.0)


@here
@pytest.mark.parametrize(("b", "n", "m", "h", "d"), [(2, 33, 50, 2, 112), (1, 70, 389, 1, 16), (1, 3, 1, 1, 112)])
def test_float8_is_near(device, b, n, m, h, d):
    """To 6 percent for normal inputs, and no worse for keys with a common part and channels of different size."""
    q, k, v = (randn(b, t, h, d, device=device, dtype=torch.bfloat16, seed=t + i) for i, t in enumerate((n, m, m)))
    sizes = torch.logspace(-2, 2, d, device=device, dtype=torch.bfloat16)
    k, v = k + 4, v * sizes
    true = softmax_attention(q, k, v, d**-0.5) / sizes
    found, defined = attend_float8(q, k, v, d**-0.5), float8.attend(q, k, v, d**-0.5)
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    assert error(found / sizes, true) < 0.06
    assert error(found / sizes, defined.double() / sizes) < 0.04  # which the weights' own rounding makes
    with pytest.raises(ValueError, match="no gradient"):
        attend_float8(q.requires_grad_(), k, v, 1.0)


_COMPILE = """
import triton
from longtake.kernels.attention import triton_hopper
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

for name, element, products in (("bf16", gl.bfloat16, "m64n128k16"), ("fp8e4nv", gl.float8e4nv, "m64n128k32")):
    def ref(rows, columns, name=name, element=element):
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)
        return f"tensordesc<{name}[1, 1, {rows}, {columns}],{layout}>"
    pointer = "*fp32" if name == "fp8e4nv" else "constexpr"
    signature = dict(
        q_ref=ref(64, 128), k_ref=ref(128, 128), v_ref=ref(128, 128), out_ref=ref(64, 128, "bf16", gl.bfloat16),
        part_ptr="*fp32", top_ptr="*fp32", scales_ptr=pointer, v_scales_ptr=pointer, scale="fp32",
        **dict.fromkeys(("keys", "heads", "rows", "whole", "pieces"), "i32"),
    )
    constants = dict(HEAD=112, STAGES=3, TURNS=True, FLOAT8=name == "fp8e4nv")
    constants |= {key: None for key, kind in signature.items() if kind == "constexpr"}
    source = GluonASTSource(triton_hopper._attend, signature | {key: "constexpr" for key in constants}, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    assert products in code.asm["ptx"] and code.metadata.shared <= 227 * 1024
"""


@pytest.mark.cpu
def test_hopper_kernels_compile_without_a_gpu(compiling):
    compiling(_COMPILE)

"""What a rank of the ring computes between two transfers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longtake.platform.parallel import ring

CPU = [("cpu", torch.float32, 1e-6), ("cpu", torch.bfloat16, 1e-2)]
GPU = [("cuda", torch.float32, 1e-5), ("cuda", torch.bfloat16, 1e-2)]


@pytest.mark.parametrize(
    ("device", "dtype", "limit"),
    [
        pytest.param(*case, marks=tier)
        for tier, cases in ((pytest.mark.cpu, CPU), (pytest.mark.gpu, GPU))
        for case in cases
    ],
)
def test_attention_to_two_blocks_merges_into_attention_to_both(device: str, dtype: torch.dtype, limit: float):
    torch.manual_seed(0)
    scale, sizes = 0.3, [19, 40]  # head dim 112 is no power of two, 37 queries fill no tile
    q, gradient = (torch.randn(2, 37, 3, 112, device=device).to(dtype) for _ in range(2))
    kv = torch.randn(2, 2, sum(sizes), 3, 112, device=device).to(dtype)
    truth = [tensor.float().transpose(1, 2).requires_grad_() for tensor in (q, *kv)]
    expected = F.scaled_dot_product_attention(truth[0], truth[1], truth[2], scale=scale)
    gradients = torch.autograd.grad(expected, truth, gradient.float().transpose(1, 2))

    out, lse = ring._attended_nothing(q)
    state, blocks = (), kv.split(sizes, dim=2)
    for block in blocks:
        part, part_lse, state = ring._attend(q, block, scale)
        out, lse = ring._merge(out, lse, part, part_lse)
    whole = out.to(dtype), lse, *state
    found = [ring._attend_backward(gradient, q, block, *whole, scale=scale) for block in blocks]
    grad_q = torch.stack([of_q for of_q, _ in found]).sum(0)
    grad_k, grad_v = torch.cat([of_kv for _, of_kv in found], dim=2)
    for ours, theirs in zip((out, grad_q, grad_k, grad_v), (expected, *gradients), strict=True):
        assert (ours.transpose(1, 2) - theirs).norm() < limit * theirs.norm()

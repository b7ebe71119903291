"""Triton's normed and rotated queries and keys against the definition."""

import pytest
import torch

from longtake.kernels.norm_rope import norm_rope, reference, triton_norm_rope

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def test_by_hand():
    q = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 1, 1, 4)  # a mean square of 6.25
    quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    room = torch.empty(1, 1, 1, 4), torch.empty(1, 1, 1, 4)
    found, k = norm_rope(q, 10 * q, torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0]), quarter, room, q)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0.0, 1.2, 1.6]))
    torch.testing.assert_close(k.flatten(), torch.tensor([0.0, 0.0, 1.2, 1.6]))
    assert k is room[0] and torch.equal(room[1], q)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, torch.finfo(HALF).eps)])
@pytest.mark.parametrize(("b", "n", "h", "d"), [(2, 5, 3, 48), (1, 3, 32, 128), (1, 1, 1, 2)])
def test_norm_rope(device, b, n, h, d, dtype, tolerance, into):
    """Of parts of a wider projection, into a part of a longer one."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    q, k, v = (3 * randn(b, n, 3 * h * d)).to(dtype).unflatten(2, (3 * h, d)).chunk(3, 2)
    angles = randn(n, h, d // 2)
    given = q, k, randn(h * d).to(dtype), randn(h * d).to(dtype), (angles.cos(), angles.sin())
    whole = torch.zeros(2, b, n + 4, h, d, device=device, dtype=dtype)
    room = (whole[0, :, -n:], whole[1, :, -n:]) if into else None
    found = triton_norm_rope.norm_rope(*given, room, v if into else None)
    for ours, true in zip(found, reference.norm_rope(*given), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, true, rtol=tolerance, atol=tolerance)
    if into:
        assert found[1].data_ptr() == whole[0, :, 4:].data_ptr() and not whole[:, :, :4].any()
        assert torch.equal(whole[1, :, 4:], v)

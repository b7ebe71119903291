"""Layers in float8: the rounding itself, Triton's against the definition, and their distance from exact ones."""

import pytest
import torch
import torch.nn.functional as F

from longtake.kernels.float8 import linear, multiplies, reference, rounded, triton_round

CUDA = torch.cuda.is_available()
here = pytest.mark.gpu if CUDA else pytest.mark.cpu


@pytest.mark.cpu
def test_by_hand():
    values, scale = reference.rounded(torch.tensor([[448.0, 1.0, -17.0], [0.0, 0.0, 0.0], [8.96, -4.48, 0.001]]))
    torch.testing.assert_close(scale, torch.tensor([[1.0], [1e-12 / 448], [0.02]]))
    # 17 lies between 16 and 18, and goes to the even one; 0.05 is below the smallest normal number.
    expected = torch.tensor([[448.0, 1.0, -16.0], [0.0, 0.0, 0.0], [448.0, -224.0, 0.05078125]])
    torch.testing.assert_close(values.float(), expected, rtol=0, atol=0)


@here
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 2240), (1, 7, 16_384)], ids=str)
def test_rounding_is_the_definitions(device, shape, gelu):
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(torch.bfloat16)[..., : shape[-1]]
    x[..., 0, :] = 0
    found, true = triton_round.rounded(x, gelu), reference.rounded(x, gelu=gelu)
    assert found.values.shape == x.shape and found.scale.shape == (*x.shape[:-1], 1)
    torch.testing.assert_close(found.scale, true.scale, rtol=1e-5, atol=0)
    # The last bit of a float32 may decide between two neighbours; Triton's interpreter rounds some to the wrong one.
    different = found.values.float() != true.values.float()
    assert float(different.float().mean()) < (1e-3 if CUDA else 0.05)


@here
@pytest.mark.parametrize(("n", "c", "d"), [(33, 48, 64), (5, 2240, 32)])
def test_a_layer_is_near_the_exact_one(device, n, c, d):
    """To 4 percent of its norm, though channels of outputs and tokens differ in size a thousandfold."""
    if not multiplies(torch.device(device)):
        pytest.skip("this GPU does not multiply float8")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    x = (torch.randn(2, n, c) * torch.logspace(-3, 0, n)[:, None]).to(device, dtype)
    weight = (torch.randn(d, c) * torch.logspace(0, 3, d)[:, None]).to(device, dtype)
    bias = torch.randn(d, device=device).to(dtype)
    given, factors = rounded(x), rounded(weight)
    found, defined = linear(given, factors, bias, dtype), reference.linear(given, factors, bias, dtype)
    assert found.dtype == dtype and found.shape == (2, n, d)
    sizes = (x.float().norm(dim=-1, keepdim=True) * weight.float().norm(dim=-1)).double() / c**0.5
    error = lambda y, true: float((((y.double() - true.double()) / sizes) ** 2).mean() ** 0.5)  # noqa: E731
    assert 0.01 < error(found, F.linear(x.double(), weight.double(), bias.double())) < 0.05
    assert error(found, defined) < 5e-3

"""Triton's GDN against its definition: values and every gradient, at odd sizes."""

import pytest
import torch
from torch import Tensor

from longtake.kernels.gdn import reference, triton_gates, triton_maps, triton_read, triton_scan
from longtake.kernels.gdn.triton_maps import FrameMaps
from longtake.kernels.gdn.triton_read import ReadStates
from longtake.kernels.gdn.triton_scan import BidirectionalStates, ScanStates

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu

# batch, frames, tokens, heads, key channels, value channels
SIZES = [(2, 5, 3, 2, 8, 6), (1, 3, 37, 2, 24, 40), (1, 4, 70, 1, 112, 112), (1, 1, 1, 3, 32, 1)]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 5e-2}
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]


def tensors(sizes, dtype, device, seed=0):
    """q, k, v, beta, decay; k as the model scales it, and k and v parts of one wider tensor, as from a projection."""
    b, t, s, h, d, v = sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(b, t, s, h * (d + v), generator=generator).to(device, dtype)
    k = (wide[..., : h * d].relu() / (d * s) ** 0.5).unflatten(-1, (h, d))
    value = wide[..., h * d :].unflatten(-1, (h, v))
    q = torch.randn(b, t, s, h, d, generator=generator).to(device, dtype).relu()
    beta, decay = (torch.rand(shape, generator=generator).to(device) for shape in ((b, t, s, h), (b, t, h)))
    return [tensor.detach().requires_grad_() for tensor in (q, k, value, beta, decay)]


def same(found, true, inputs, tolerance):
    """Outputs and gradients of the inputs, each to a relative error of its norm."""
    found, true = (out if isinstance(out, tuple) else (out,) for out in (found, true))
    for ours, theirs in zip(found, true, strict=True):
        assert error(ours, theirs) < tolerance
    gradients = (torch.autograd.grad([weighted(out) for out in outs], inputs) for outs in (found, true))
    for number, (ours, theirs) in enumerate(zip(*gradients, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, theirs) < tolerance, f"gradient {number}"


def weighted(out: Tensor) -> Tensor:
    return (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)).sum()


def error(found: Tensor, true: Tensor) -> float:
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / true.norm().clamp(min=1e-6))


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(device, dtype, camera):
    b, t, s, h = 2, 3, 70, 5
    generator = torch.Generator().manual_seed(0)
    projected, dt_bias, a_log, inflation = (
        torch.randn(shape, generator=generator).to(device) for shape in ((b, t * s, 2 * h), (h,), (h,), (b, t * s, h))
    )
    dt_bias[0] = 30  # whose softplus is itself
    given = (3 * projected).to(dtype), t, dt_bias.to(dtype), a_log.to(dtype), 2 * inflation.exp() if camera else None
    found, true = triton_gates.gates(*given), reference.gates(*given)
    for ours, theirs in zip(found, true, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(device, sizes, dtype):
    _, *inputs = tensors(sizes, dtype, device)
    found = FrameMaps.apply(inputs[3], *inputs[:3])
    same(found, reference.frame_maps(*inputs), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("roomy", [True, False])
def test_maps_of_branches_that_share_a_decay(device, roomy, monkeypatch):
    monkeypatch.setattr(triton_maps, "roomy", lambda _: roomy)  # a GPU with little shared memory divides the values
    (*first, decay), (*second, _) = (tensors(SIZES[1], DTYPES[1], device, seed)[1:] for seed in range(2))
    maps = [reference.frame_maps(k, v, beta, decay) for k, v, beta in (first, second)]
    true = tuple(torch.cat(parts) for parts in zip(*maps, strict=True))
    same(FrameMaps.apply(decay, *first, *second), true, [decay, *first, *second], TOLERANCE[DTYPES[1]])


@pytest.mark.parametrize("branches", [1, 2])
def test_every_map_by_one_launch(device, branches):
    given = [tensors((2, 3, 70, 2, 24, 24), DTYPES[1], device, seed)[1:] for seed in range(branches)]
    plain, decay = tensors((2, 3, 70, 2, 24, 24), DTYPES[1], device, 5)[0] / 40, given[0][3]
    with torch.no_grad():
        kept = [(k, v, beta) for k, v, beta, _ in given]
        (transition, increment), mass = triton_maps.every_map(kept, plain, decay)
        for number, branch in enumerate(kept):
            for found, true in zip((transition, increment), reference.frame_maps(*branch, decay), strict=True):
                assert error(found[2 * number :][:2], true) < TOLERANCE[DTYPES[1]]
        true = reference.frame_maps(plain, torch.ones_like(plain[..., :1]), kept[0][2], decay)
        assert all(error(*pair) < TOLERANCE[DTYPES[1]] for pair in zip(mass, true, strict=True))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_scan_from_a_state_to_a_state(device, sizes):
    _, *inputs = tensors(sizes, torch.float32, device)
    b, _, _, h, d, v = sizes
    state = torch.randn(b, h, v, d, device=device, requires_grad=True)
    transition, increment = (x.detach().requires_grad_() for x in reference.frame_maps(*inputs))
    states = reference.scan_states(transition, increment, state)
    found = ScanStates.apply(transition, increment, state)
    same(found, (states, states[:, -1]), [transition, increment, state], TOLERANCE[torch.float32])


@pytest.mark.parametrize("sizes", SIZES)
def test_both_directions(device, sizes):
    _, *inputs = tensors(sizes, torch.float32, device)
    maps = [x.detach().requires_grad_() for x in reference.frame_maps(*inputs)]
    found = BidirectionalStates.apply(*maps)
    same(found, reference.bidirectional_states(*maps), maps, TOLERANCE[torch.float32])
    b, _, _, h, d, v = sizes
    maps.append(torch.randn(b, h, v, d, device=device, requires_grad=True))  # a state to start from
    found = BidirectionalStates.apply(*maps)
    same(found, reference.bidirectional_states(*maps), maps, TOLERANCE[torch.float32])


@pytest.mark.parametrize("sizes", SIZES)
def test_both_directions_where_nobody_wants_a_gradient(device, sizes):
    _, *inputs = tensors(sizes, torch.float32, device)
    b, t, _, h, d, v = sizes
    with torch.no_grad():
        transition, increment = reference.frame_maps(*inputs)
        starts = torch.randn(b, h, v, d, device=device), torch.randn(1, h, 3, d, device=device)
        for state, other_state in ((None, None), starts, (None, starts[1])):
            first = transition, increment, state
            other = transition[:1].flip(1), torch.randn(1, t, h, 3, d, device=device), other_state
            for given in ((first, other), (first,)):
                for found, scan in zip(triton_scan.summed(*given), given, strict=True):
                    assert error(found, reference.bidirectional_states(*scan)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_directions_from_states_of_their_own(device, sizes, adjoint):
    _, *inputs = tensors(sizes, torch.float32, device)
    transition, increment = (x.detach() for x in reference.frame_maps(*inputs))
    b, _, _, h, d, v = sizes
    start, further = (torch.randn(2, b, h, rows, d, device=device) for rows in (v, v + d))
    # Of the further rows none has increments.
    for state, keep, only in ((start, True, None), (further, False, None), (start[:1], True, 0), (start[:1], True, 1)):
        true, true_end = reference.carry(transition, increment, state, adjoint, keep, only)
        found, end = triton_scan.carry(transition, increment, state, adjoint, keep, only)
        assert len(found) == len(true) == len(state) * keep
        assert all(
            error(*pair) < TOLERANCE[torch.float32] for pair in zip([*found, end], [*true, true_end], strict=True)
        )
    states, _ = reference.carry(transition, increment, start)
    gradients = zip(*(scan.to_maps(start, states, states[::-1]) for scan in (triton_scan, reference)), strict=True)
    assert all(error(*pair) < TOLERANCE[torch.float32] for pair in gradients)


@torch.no_grad()
def test_reading_of_both_branches(device):
    sizes = 2, 3, 70, 2, 24, 24
    q, plain, camera = (tensors(sizes, DTYPES[1], device, seed)[0] for seed in range(3))
    states, of_camera = torch.randn(2, 2, 3, 2, 24, 24, device=device)
    mass = torch.rand(2, 3, 2, 24, device=device)
    found = triton_read.read_both((q, states, plain, mass), camera, of_camera, 1e-2)
    true = reference.read(q, states, plain, mass, 1e-2), reference.read(camera, of_camera)
    assert all(error(*pair) < TOLERANCE[DTYPES[1]] for pair in zip(found, true, strict=True))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reading(device, sizes, dtype, normalised):
    b, t, _, h, d, v = sizes
    inputs = [tensors(sizes, dtype, device)[0], torch.randn(b, t, h, v, d, device=device, requires_grad=True)]
    if normalised:
        inputs += [tensors(sizes, dtype, device, seed=1)[0], torch.rand(b, t, h, d, device=device, requires_grad=True)]
    q, states, plain, mass = [*inputs, None, None][:4]
    found = ReadStates.apply(q, states, plain, mass, 1e-2)
    same(found, reference.read(q, states, plain, mass, 1e-2), inputs, TOLERANCE[dtype])

"""Triton's `encode` against its definition: values and every gradient."""

import pytest
import torch

from longtake.kernels import ucpe
from longtake.kernels.ucpe import reference
from longtake.kernels.ucpe.triton_encode import Encode

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]
OPTIONS = {  # normalised, rays, relu, scale, downscale, inverse rope
    "queries": (True, False, True, 1.0, False, False),
    "keys": (True, False, True, 0.125, False, False),
    "queries of softmax": (True, False, False, 1.0, False, False),
    "ray keys": (True, True, True, 0.125, True, False),
    "ray keys as they are": (True, True, True, 0.125, False, False),
    "ray values": (False, True, False, 1.0, True, False),
    "back from rays": (False, True, False, 1.0, False, True),
}


@pytest.mark.parametrize(("sizes", "dtype"), [((2, 3, 2, 8), DTYPES[0]), ((1, 2, 5, 112), DTYPES[1])])
@pytest.mark.parametrize("name", OPTIONS)
def test_encode(device, name, sizes, dtype):
    normalised, rays, relu, scale, downscale, inverse = OPTIONS[name]
    b, n, h, d = sizes
    torch.manual_seed(0)
    x = torch.randn(b, n, 3 * h * d).to(device, dtype).chunk(3, dim=-1)[1].unflatten(-1, (h, d)).requires_grad_()
    weight = (1 + 0.1 * torch.randn(h * d, device=device)).requires_grad_() if normalised else None
    matrix = torch.randn(b, n, 4, 4, device=device).transpose(-1, -2) if rays else None
    rope = torch.randn(n, d // (4 if rays else 2), 2, device=device)
    rope = rope / rope.norm(dim=-1, keepdim=True)
    plain, encoded = reference.encode(x, rope, weight, matrix, relu, scale, downscale, inverse)
    true = encoded, plain, reference.inflation(plain, encoded)
    found = Encode.apply(x, weight, matrix, rope, (relu, scale, downscale, inverse, reference.EPS), (True, True))
    inputs = [x] if weight is None else [x, weight]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(device) for out in true]
    for ours, theirs in zip(found, true, strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]
    for used in ([0, 1], [0, 2], [0]):  # what the model takes of them
        grads = [
            torch.autograd.grad([(outs[i] * weights[i]).sum() for i in used], inputs, retain_graph=True)
            for outs in (found, true)
        ]
        for ours, theirs in zip(*grads, strict=True):
            assert ours.dtype == theirs.dtype
            assert error(ours, theirs) < TOLERANCE[dtype], used


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("clips", [1, 2])  # of one, the room lies together
@torch.no_grad()
def test_what_is_encoded_is_put_where_there_is_room(device, clips, triton, monkeypatch):
    monkeypatch.setattr(ucpe, "fused", lambda *_: triton)
    x, rope = torch.randn(clips, 3, 2, 8, device=device), torch.randn(3, 4, 2, device=device)
    whole = torch.full((clips, 5, 2, 8), torch.nan, device=device)
    encoded, *_ = ucpe.encode(x, rope, into=whole[:, :3])
    assert encoded.data_ptr() == whole.data_ptr() and encoded.shape == x.shape
    assert torch.equal(whole[:, :3], ucpe.encode(x, rope)[0]) and whole[:, 3:].isnan().all()


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("rooms", [False, True])
@torch.no_grad()
def test_a_camera_branch_by_one_launch(device, clips, rooms, monkeypatch):
    n, h, d, dtype = 3, 5, 24, DTYPES[1]
    torch.manual_seed(0)
    branch = torch.randn(clips, n, 3 * h * d).to(device, dtype).chunk(3, dim=-1)
    branch = tuple(x.unflatten(-1, (h, d)) for x in branch)
    weights = tuple(1 + 0.1 * torch.randn(h * d, device=device) for _ in range(2))
    matrix = torch.randn(1, n, 4, 4, device=device)  # of all clips
    rope = torch.randn(n, d // 4, 2, device=device)
    results = []
    for triton in (False, True):
        monkeypatch.setattr(ucpe, "fused", lambda *_, triton=triton: triton)
        into = [x.new_zeros(clips, 2 * n, h, d)[:, n:] for x in branch[1:]] if rooms else (None, None)
        results.append(ucpe.to_rays(branch, weights, (matrix.mT, matrix), rope, True, 0.125, True, into))
        for made, room in zip(results[-1][1:3], into, strict=True):
            assert room is None or made.data_ptr() == room.data_ptr()
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]


def error(found, true):
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / true.norm().clamp(min=1e-6))

"""Triton's `modulate`, `gated` and `output_gate` against their definitions: values and every gradient."""

import pytest
import torch

from longtake.kernels.modulate import gated, modulate, output_gate, reference, triton_modulate
from longtake.kernels.modulate.triton_gates import Gated, OutputGate
from longtake.kernels.modulate.triton_modulate import Modulate

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cpu

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CASES = [  # clips, frames, tokens a frame, channels; dtype of tokens and of the modulation
    ((2, 3, 5, 48), torch.float32, torch.float32),
    ((1, 1, 66, 130), torch.float32, torch.float32),
    ((2, 2, 3, 256), HALF, HALF),
    ((1, 1, 1, 33), HALF, torch.float32),
    ((1, 2, 3, 2240), HALF, HALF),
]


@pytest.fixture(params=CASES, ids=lambda case: "x".join(map(str, case[0])))
def tensors(request, device):
    """Tokens (B, N, C), four of them; and the six parts of a modulation (B, T, 1, C), not contiguous."""
    (b, t, s, c), dtype, of_modulation = request.param
    torch.manual_seed(0)
    tokens = [(3 + torch.randn(b, t * s, c)).to(device, dtype).requires_grad_() for _ in range(4)]
    parts = torch.randn(b, t, 6, c).to(device, of_modulation).chunk(6, dim=2)
    return tokens, [part.requires_grad_() for part in parts]


def check(found, true, inputs):
    """Values, dtypes and gradients."""
    by = torch.randn(true.shape, generator=torch.Generator().manual_seed(1)).to(true)
    grads = (torch.autograd.grad((out * by).sum(), inputs) for out in (found, true))
    for ours, theirs in zip((found, *next(grads)), (true, *next(grads)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert (ours - theirs).norm() <= TOLERANCE[true.dtype] * theirs.norm()


def test_by_hand():
    x, one = torch.tensor([[[3.0, 1.0], [0.0, 8.0]]]), torch.ones(1, 2, 1, 2)  # two frames of a token
    shift, gate = torch.tensor([[[[5.0, 6.0]], [[0.0, 0.0]]]]), torch.tensor([[[[0.5, 0.0]], [[1.0, 2.0]]]])
    expected = torch.tensor([[[5 + 2.0, 6 - 2.0], [-2.0, 2.0]]])
    torch.testing.assert_close(modulate(x, shift, one), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gated(x, gate, x), torch.tensor([[[4.5, 1.0], [0.0, 24.0]]]))
    torch.testing.assert_close(gated(x, gate, x, -x, x), 2 * x)
    silu = torch.tensor([[[2.857722, 0.731059], [0.0, 7.997317]]])
    torch.testing.assert_close(output_gate(x, x, -x + 1), silu, atol=1e-5, rtol=0)


@pytest.mark.parametrize("programs", [528, 7])
def test_modulate(tensors, programs, monkeypatch):
    monkeypatch.setattr(triton_modulate, "_PROGRAMS", programs)  # backwards, several tokens of each
    (x, *_), (shift, scale, *_) = tensors
    found = Modulate.apply(x, shift, scale, reference.EPS)
    check(found, reference.modulate(x, shift, scale), [x, shift, scale])


def test_modulate_without_gradients_of_the_modulation(tensors):
    (x, *_), (shift, scale, *_) = tensors
    shift, scale = shift.detach(), scale.detach()
    check(Modulate.apply(x, shift, scale, reference.EPS), reference.modulate(x, shift, scale), [x])


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_gated(tensors, more, plus):
    (x, y, more_y, added), (_, _, gate, *_) = tensors
    inputs = x, gate, y, more_y if more else None, added if plus else None
    check(Gated.apply(*inputs), reference.gated(*inputs), [tensor for tensor in inputs if tensor is not None])


@pytest.mark.parametrize("frozen", ["gate", "y"])
def test_gated_without_some_gradients(tensors, frozen):
    (x, y, *_), (_, _, gate, *_) = tensors
    inputs = [x, gate.detach() if frozen == "gate" else gate, y.detach() if frozen == "y" else y, None, None]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    check(Gated.apply(*inputs), reference.gated(*inputs), wanted)


@torch.no_grad()
def test_a_sum_is_modulated_as_it_is_stored(tensors):
    (x, y, *_), (shift, scale, *_) = tensors
    total, found = triton_modulate.add_and_modulate(x, y, shift, scale, reference.EPS)
    true = reference.modulate(x.float() + y.float(), shift, scale)
    torch.testing.assert_close(total, x + y, rtol=0, atol=0)
    assert found.dtype == torch.promote_types(x.dtype, scale.dtype)
    assert (found.double() - true.double()).norm() <= TOLERANCE[x.dtype] * true.double().norm()


@pytest.mark.parametrize("with_camera", [False, True])
def test_output_gate(tensors, with_camera):
    out, gate, camera, _ = tensors[0]
    inputs = out, gate, camera if with_camera else None
    check(OutputGate.apply(*inputs), reference.output_gate(*inputs), [out, gate, *inputs[2:]][: 2 + with_camera])


def test_tokens_that_are_not_contiguous(tensors):
    tokens, (shift, scale, gate, *_) = tensors
    x, y, more_y, plus = (tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in tokens)
    x, y, more_y, plus = (tensor.requires_grad_() for tensor in (x, y, more_y, plus))
    check(Modulate.apply(x, shift, scale, reference.EPS), reference.modulate(x, shift, scale), [x])
    inputs = x, gate, y, more_y, plus
    check(Gated.apply(*inputs), reference.gated(*inputs), inputs)
    check(OutputGate.apply(x, y, plus), reference.output_gate(x, y, plus), [x, y, plus])
    x, y, plus = (tensor.detach() for tensor in (x, y, plus))
    part = torch.cat([x, y, x], -1).chunk(3, -1)[1]
    torch.testing.assert_close(OutputGate.apply(x, part, plus), OutputGate.apply(x, y, plus), rtol=0, atol=0)

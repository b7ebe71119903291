"""The definitions against loops written out from the formulas, values and gradients, at odd sizes."""

import pytest
import torch

from longtake.kernels.gdn import reference
from longtake.kernels.gdn.reference import compose, frame_maps, gdn_bidirectional, gdn_scan
from longtake.kernels.short_conv.reference import short_conv
from longtake.kernels.ucpe.reference import rotate, ucpe

pytestmark = pytest.mark.cpu


def inputs(b=2, t=5, s=3, h=2, d=4, v=6):
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, s, h, d), (b, t, s, h, d), (b, t, s, h, v))
    q, k, value = (torch.randn(shape, generator=generator) for shape in shapes)
    beta, decay = (torch.rand(shape, generator=generator) for shape in ((b, t, s, h), (b, t, h)))
    return [tensor.requires_grad_() for tensor in (q, k / (d * s) ** 0.5, value, beta, decay)]


def loop(q, k, v, beta, decay, frames, state, inclusive=True):
    """One token, head and clip at a time: out[t] = M_t q."""
    rows = []
    for t in frames:
        read = state
        parts = []
        for b in range(q.shape[0]):
            for h in range(q.shape[3]):
                keys, weights = k[b, t, :, h], torch.diag(beta[b, t, :, h])
                erase = decay[b, t, h] * (torch.eye(q.shape[-1]) - keys.T @ weights @ keys)
                parts.append(state[b, h] @ erase + v[b, t, :, h].T @ weights @ keys)
        state = torch.stack(parts).view(q.shape[0], q.shape[3], v.shape[-1], q.shape[-1])
        rows.append(torch.einsum("bhvd,bshd->bshv", state if inclusive else read, q[:, t]))
    return rows, state


def same_gradients(ours, theirs, tensors):
    weights = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    for mine, true in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_the_scan_is_the_recurrence_with_all_gradients():
    tensors = inputs()
    state = torch.randn(2, 2, 6, 4, requires_grad=True)
    out, last = gdn_scan(*tensors, state=state)
    rows, true_last = loop(*tensors, frames=range(5), state=state)
    true = torch.stack(rows, dim=1)
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, true_last, rtol=1e-4, atol=1e-5)
    same_gradients(out, true, [*tensors, state])


def test_both_directions_count_every_frame_once():
    tensors = inputs(t=4)
    zeros = torch.zeros(2, 2, 6, 4)
    forward, _ = loop(*tensors, frames=range(4), state=zeros)
    # Backwards, frame t reads the state that frames t + 1 ... left.
    backward, _ = loop(*tensors, frames=range(3, -1, -1), state=zeros, inclusive=False)
    true = torch.stack(forward, dim=1) + torch.stack(backward[::-1], dim=1)
    out = gdn_bidirectional(*tensors)
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)
    same_gradients(out, true, tensors)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_scan_cut_anywhere_continues_from_its_state(cut):
    tensors = inputs()
    whole, last = gdn_scan(*tensors)
    first, state = gdn_scan(*(tensor[:, :cut] for tensor in tensors))
    second, end = gdn_scan(*(tensor[:, cut:] for tensor in tensors), state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("frames", [33, 50])
def test_a_scan_in_runs_equals_frame_by_frame(frames):
    _, *tensors = inputs(t=frames)
    given = [x.detach().requires_grad_() for x in (*frame_maps(*tensors), torch.randn(2, 2, 6, 4))]
    found, true = reference._scan_in_runs(*given), reference.scan_states(*given)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    same_gradients(found, true, given)


def test_composed_frames_are_one_map():
    _, k, v, beta, decay = inputs(t=2)
    transition, increment = frame_maps(k, v, beta, decay)
    a, u = compose((transition[:, 0], increment[:, 0]), (transition[:, 1], increment[:, 1]))
    _, last = gdn_scan(torch.zeros_like(k), k, v, beta, decay, start := torch.randn(2, 2, 6, 4))
    torch.testing.assert_close(start @ a + u, last)


def test_short_conv_is_the_causal_kernel_run_both_ways():
    x, weight = torch.randn(2, 5, 3, 4), torch.randn(4, 1, 4)

    def causal(sequence):
        flat = sequence.permute(0, 2, 3, 1).reshape(6, 4, 5)
        return (
            torch.nn.functional.conv1d(flat, weight, padding=3, groups=4)[..., :5].view(2, 3, 4, 5).permute(0, 3, 1, 2)
        )

    both = causal(x) + causal(x.flip(1)).flip(1) - x * weight[:, 0, -1]
    torch.testing.assert_close(short_conv(x, weight), both)


def test_rotation_is_a_complex_product():
    x, angle = torch.randn(2, 5, 3, 8), torch.rand(5, 4)
    out = rotate(x, torch.stack([angle.cos(), angle.sin()], -1))
    true = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(5, 1, 4), angle[:, None])
    torch.testing.assert_close(out, torch.view_as_real(true).flatten(-2))


def test_ucpe_with_inverse_matrix_and_rotation_undoes_itself():
    x, matrix, angle = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 4, 4) + 3 * torch.eye(4), torch.rand(5, 4)
    rope = torch.stack([angle.cos(), angle.sin()], -1)
    there = ucpe(x, matrix, rope)
    torch.testing.assert_close(there[0, 1, 2, 4:8], matrix[0, 1] @ x[0, 1, 2, 4:8])
    torch.testing.assert_close(ucpe(there, matrix.inverse(), rope, inverse_rope=True), x, rtol=1e-4, atol=1e-4)

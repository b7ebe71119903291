"""Frame-wise Gated DeltaNet in torch: the definition that every faster version has to equal.

Shapes: B batch, T frames, S tokens a frame, H heads, D key channels, V value channels. With K_t (S, D), V_t (S, V) and
diag(beta_t) (S, S), the state M (V, D) of a head moves once a frame (SANA-WM section 3, after Gated DeltaNet,
arXiv 2412.06464):

    M_t = M_{t-1} g_t (I - K_t^T diag(beta_t) K_t) + V_t^T diag(beta_t) K_t            out_t = Q_t M_t^T

so a run of frames is an affine map M -> M A + U of the state, and two such maps compose into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.launch import wide

_LONGEST_RUN = 32  # frames that a GPU scans one by one, each step a launch; a CPU scans all


def gdn_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over frames; every token of a frame reads the state after that frame.

    q, k (B, T, S, H, D); v (B, T, S, H, V); beta (B, T, S, H) in [0, 1]; decay (B, T, H) in [0, 1], linear, not its
    logarithm; state (B, H, V, D), zeros by default. Returns out (B, T, S, H, V) and the last state, both float32.
    """
    transition, increment = frame_maps(k, v, beta, decay)
    states = scan_states(transition, increment, state)
    return read_states(q, states), states[:, -1]


def gdn_bidirectional(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The sum of two scans: frames 0 ... t, and backwards from the end over frames T-1 ... t+1. Shapes as in
    `gdn_scan`.
    """
    transition, increment = frame_maps(k, v, beta, decay)
    return read_states(q, bidirectional_states(transition, increment))


def gates(
    projected: Tensor, frames: int, dt_bias: Tensor, a_log: Tensor, inflation: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """beta (B, T, S, H) of each token, decay (B, T, H) of each frame, and, where a camera branch's keys grew by
    `inflation` (B, T S, H), its beta; float32.

    projected (B, T S, 2 H): first what beta is the sigmoid of, then what a frame's mean is taken of: with dt_bias (H)
    its softplus is the time that passes, and exp(a_log (H)) how fast is forgotten. The camera's beta is as much smaller
    as its keys' squares are larger, in a frame's mean.
    """
    of_token, of_frame = wide(projected).unflatten(1, (frames, -1)).chunk(2, dim=-1)
    step = F.softplus(of_frame.mean(2) + wide(dt_bias))
    beta, decay = of_token.sigmoid(), (-wide(a_log).exp() * step).exp()
    if inflation is None:
        return beta, decay, None
    return beta, decay, beta / inflation.unflatten(1, (frames, -1)).mean(2, keepdim=True).clamp(min=1)


def frame_maps(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Each frame as a map M -> M A + U: transition A (B, T, H, D, D), increment U (B, T, H, V, D), float32."""
    k, v, beta, decay = (wide(x) for x in (k, v, beta, decay))
    weighted = (k * beta[..., None]).permute(0, 1, 3, 2, 4)
    identity = torch.eye(k.shape[-1], device=k.device)
    transition = decay[..., None, None] * (identity - k.permute(0, 1, 3, 4, 2) @ weighted)
    return transition, v.permute(0, 1, 3, 4, 2) @ weighted


def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The map that applies `first`, then `second`. Associative."""
    (a, u), (b, w) = first, second
    return a @ b, u @ b + w


def scan_states(transition: Tensor, increment: Tensor, state: Tensor | None = None) -> Tensor:
    """The state after every frame, (B, T, H, V, D)."""
    frames, (b, _, h, rows, d) = increment.shape[1], increment.shape
    if state is None:
        state = increment.new_zeros(b, h, rows, d)
    if frames > _LONGEST_RUN and transition.is_cuda:
        return _scan_in_runs(transition, increment, state)
    state = wide(state).reshape(b * h, rows, d)
    # The only serial part: one batched product a frame.
    transitions = transition.transpose(0, 1).reshape(frames, b * h, d, d).unbind()
    increments = increment.transpose(0, 1).reshape(frames, b * h, rows, d).unbind()
    states = []
    for step, added in zip(transitions, increments, strict=True):
        state = torch.baddbmm(added, state, step)
        states.append(state)
    return torch.stack(states).view(frames, b, h, rows, d).transpose(0, 1)


def run_maps(
    transition: Tensor, increment: Tensor, scan: Callable[[Tensor, Tensor, Tensor], Tensor] = scan_states
) -> tuple[Tensor, Tensor]:
    """Frames 0 ... t as one map, for every t: transition (B, T, H, D, D) and increment (B, T, H, V, D).

    One `scan`: the increments start from zeros, the transitions, as further rows of the state, from the identity.
    """
    rows, d = increment.shape[-2:]
    start = torch.eye(rows + d, device=increment.device, dtype=increment.dtype)[:, rows:].expand(
        len(increment), increment.shape[2], -1, d
    )
    states = scan(transition, F.pad(increment, (0, 0, 0, d)), start)
    increment, transition = states.split([rows, d], dim=-2)
    return transition, increment


def _scan_in_runs(transition: Tensor, increment: Tensor, state: Tensor) -> Tensor:
    """`scan_states` in some 2 sqrt(T) serial steps of up to three times the work.

    The maps of all runs of sqrt(T) frames are made at once; then the states between runs; then every frame's own state
    follows from its run's first.
    """
    b, frames, h, _, d = increment.shape
    length = math.isqrt(frames - 1) + 1
    missing = -frames % length
    identity = torch.eye(d, device=state.device, dtype=state.dtype).expand(b, missing, h, d, d)
    transition = torch.cat([transition, identity], 1).unflatten(1, (-1, length)).flatten(0, 1)
    increment = F.pad(increment, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(1, (-1, length)).flatten(0, 1)
    through, since = (maps.unflatten(0, (b, -1)) for maps in run_maps(transition, increment))
    ends = scan_states(through[:, :, -1], since[:, :, -1], state)
    before = torch.cat([wide(state[:, None]), ends[:, :-1]], 1)
    return (before[:, :, None] @ through + since).flatten(1, 2)[:, :frames]


def bidirectional_states(transition: Tensor, increment: Tensor, state: Tensor | None = None) -> Tensor:
    """State after frame t scanning forwards, from `state` (B, H, V, D) or zeros, plus state of frames after t scanning
    backwards, (B, T, H, V, D). After the last frame there is none, so the last is where the forward scan ends.
    """
    # Backwards, frame t reads what frames T-1 ... t+1 left: its own map is not applied, the last frame reads zeros.
    after = torch.cat([torch.zeros_like(increment[:, :1]), increment[:, 1:].flip(1)], 1)
    steps = torch.cat([torch.ones_like(transition[:, :1]), transition[:, 1:].flip(1)], 1)
    start = None if state is None else torch.cat([wide(state), torch.zeros_like(state, dtype=torch.float32)])
    both = scan_states(torch.cat([transition, steps]), torch.cat([increment, after]), start)
    forward, backward = both.chunk(2)
    return forward + backward.flip(1)


def carry(
    transition: Tensor,
    increment: Tensor,
    start: Tensor,
    adjoint: bool = False,
    keep: bool = True,
    only: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Both scans of `bidirectional_states`, each from its `start`: the state after every frame, forwards; the one
    before every frame's map, backwards; and the two that are left at the end.

    transition (B, T, H, D, D), increment (B, T, H, V, D), start (2, B, H, R, D). Of R > V rows, the last have no
    increments. adjoint: from `increment`, the gradient of their sum, and `start`, that of the end: each scan's gradient
    of the increments, and that of the start. keep: without it, the end alone. only: one of the scans, 0 forwards or 1
    backwards, with a `start` of one and a list of one. No gradient flows through this.
    """
    a = transition.transpose(-1, -2) if adjoint else transition
    u = F.pad(increment, (0, 0, 0, start.shape[-2] - increment.shape[-2]))
    frames, kept, ends = range(increment.shape[1]), [], []
    for direction, state in enumerate(start.unbind(), only or 0):
        after: list[Tensor] = []
        forwards = (direction == 0) != adjoint
        for t in frames if forwards else reversed(frames):
            if adjoint and direction == 0:  # a state holds its frame's increment
                after.append(state + u[:, t])
                state = after[-1] @ a[:, t]
            elif direction == 0:
                state = state @ a[:, t] + u[:, t]
                after.append(state)
            else:
                after.append(state)
                state = state @ a[:, t] + u[:, t]
        kept.append(torch.stack(after if forwards else after[::-1], 1))
        ends.append(state)
    return kept if keep else [], torch.stack(ends)


def to_maps(start: Tensor, states: Sequence[Tensor], adjoints: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of transition and increment from what `carry` made of them and of the states' gradients."""
    before = torch.cat([start[0][:, None], states[0][:, :-1]], 1)
    d_transition = before.transpose(-1, -2) @ adjoints[0] + states[1].transpose(-1, -2) @ adjoints[1]
    return d_transition, adjoints[0] + adjoints[1]


def read_states(q: Tensor, states: Tensor) -> Tensor:
    """out_t = Q_t M_t^T: (B, T, S, H, V) from q (B, T, S, H, D) and states (B, T, H, V, D)."""
    out = wide(q).permute(0, 1, 3, 2, 4) @ states.transpose(-1, -2)
    return out.permute(0, 1, 3, 2, 4)


def read(
    q: Tensor, states: Tensor, plain: Tensor | None = None, mass: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """`read_states` over the normaliser, which queries `plain` (B, T, S, H, D) read from `mass` (B, T, H, D); without
    one the numerator alone. float32.
    """
    num = read_states(q, states)
    if plain is None or mass is None:
        return num
    return num / (torch.einsum("btshd,bthd->btsh", wide(plain), mass)[..., None] + eps)

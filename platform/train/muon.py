"""Muon: momentum whose update for every matrix is orthogonalised (Keller Jordan, 2024), Adam for all other parameters.

Every direction of a weight matrix moves at about the same speed, however small its gradient. Whether that beats Adam
depends on the problem: on a small linear regression Adam wins, so compare the two before choosing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose fixed interval of singular values is about [0.7, 1.2]


class Muon(torch.optim.Optimizer):
    """Both rules in one optimiser, so that trainers and checkpoints see a single one.

    matrices: parameters of two and more dimensions, flattened to (shape[0], rest). Their update has root mean square
    0.2 lr whatever the shape, which is Adam's usual size, so learning rates carry over. others: follow Adam at
    lr x adam_ratio. weight_decay is decoupled and applies to the matrices.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        adam_ratio: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "adam_ratio": adam_ratio, "betas": betas, "eps": eps}
        groups = [
            {"params": list(matrices), "orthogonal": True, "weight_decay": weight_decay},
            {"params": list(others), "orthogonal": False, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._orthogonal if group["orthogonal"] else self._adam)(group, parameters)

    def _orthogonal(self, group: dict, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._state(p, "momentum") for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))  # Nesterov's look ahead
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, update in enumerate(updates):
            by_shape[update.shape[0], update[0].numel()].append(index)
        for (rows, columns), indices in by_shape.items():
            stacked = torch.stack([updates[index].reshape(rows, columns) for index in indices])
            size = 0.2 * max(rows, columns) ** 0.5
            for index, update in zip(indices, size * orthogonalise(stacked), strict=True):
                updates[index] = update.view_as(updates[index])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _adam(self, group: dict, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self._state(p, "first") for p in parameters]
        second = [self._state(p, "second") for p in parameters]
        group["steps"] = group.get("steps", 0) + 1
        (beta1, beta2), steps = group["betas"], group["steps"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(scale, group["eps"])
        rate = group["lr"] * group["adam_ratio"] / (1 - beta1**steps)
        torch._foreach_addcdiv_(parameters, first, scale, -rate)

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T in (B, m, n), by Newton-Schulz iteration; bfloat16 inside on a GPU."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def matrices_and_others(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of `module` by how Muon should treat them.

    Embeddings, vectors, and what is a bundle of short filters (depthwise convolutions, modulation tables) go to Adam.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices, others = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            wide = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
            (matrices if wide and id(parameter) not in embeddings else others).append(parameter)
    return matrices, others

import copy

import pytest
import torch
from torch import nn

from longtake.platform.train.muon import Muon, matrices_and_others, orthogonalise

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_every_parameter_belongs_to_exactly_one_rule():
    net = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 64), nn.Conv1d(64, 64, 3, groups=64), nn.LayerNorm(64))
    matrices, others = matrices_and_others(net)
    assert [tuple(p.shape) for p in matrices] == [(64, 32)]
    assert {id(p) for p in matrices} | {id(p) for p in others} == {id(p) for p in net.parameters()}


def test_a_badly_scaled_regression_is_learnt_in_60_steps():
    """Inputs differ a hundredfold in scale; plain gradient descent at this rate is left with a third of the loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32))
    x = torch.randn(256, 32) * torch.logspace(0, -2, 32)
    y = x @ torch.randn(32, 32)
    optimiser = Muon(*matrices_and_others(net), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (net(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_its_state_survives_a_checkpoint():
    def steps(net, optimiser, count):
        for step in range(count):
            net(torch.full((4, 16), 0.1 * (step + 1))).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()

    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    optimiser = Muon(*matrices_and_others(net), lr=0.01)
    steps(net, optimiser, 3)
    again = nn.Linear(16, 16)
    again.load_state_dict(net.state_dict())
    resumed = Muon(*matrices_and_others(again), lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))  # a file shares no memory either
    steps(net, optimiser, 2)
    steps(again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))

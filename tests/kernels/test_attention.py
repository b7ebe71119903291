"""The choice among torch's attentions."""

import pytest
import torch

from longtake.jobs import explain
from longtake.kernels import attention, launch
from longtake.kernels.attention import attend, choose

pytestmark = pytest.mark.cpu


def test_the_result_is_softmax_attention():
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, 0.3), torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_the_fastest_that_can_is_chosen_once_a_shape(monkeypatch):
    timed = []

    def milliseconds(name, inputs, scale, backward):
        timed.append((name, backward))
        return {"hopper": None, "cudnn": None, "flash": 3.0, "efficient": 2.0}[name]

    monkeypatch.setattr(attention, "_milliseconds", milliseconds)
    monkeypatch.setattr(attention, "_choices", {})
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    expected = attention.Choice("efficient", {"flash": 3.0, "efficient": 2.0})
    assert choose(q, k, v, 1.0) == choose(q, k, v, 1.0) == expected
    assert [backward for _, backward in timed] == [False] * 4
    choose(q.requires_grad_(), k, v, 1.0)
    assert [backward for _, backward in timed[4:]] == [True] * 4


def test_a_shape_that_none_computes_is_said(monkeypatch):
    monkeypatch.setattr(attention, "_milliseconds", lambda *_: None)
    monkeypatch.setattr(attention, "_choices", {})
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"\(1, 2, 4, 8\)"):
        choose(q, k, v, 1.0)


def test_explain_says_what_runs_here(capsys):
    explain.main(["--preset", "tiny", "--frames", "2"])
    assert "definitions in torch" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 1"):
        explain.main(["--frames", "0"])


def test_a_choice_of_kernels_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("LONGTAKE_KERNELS", "cuda")
    launch._by_environment.cache_clear()
    with pytest.raises(ValueError, match="choose triton"):
        explain.main(["--preset", "tiny", "--frames", "2"])
    monkeypatch.setenv("LONGTAKE_KERNELS", "definitions")
    assert "asks for them" in launch.reason()
    launch._by_environment.cache_clear()

"""Gates: their formulas, exactly one at equal scores of zero, and a slope there."""

from __future__ import annotations

import math

import pytest
import torch

from uoe_parallel.routing.gates import GATES, Gate, SigmoidGate, SoftmaxGate

every_gate = pytest.mark.parametrize("gate", [rule() for rule in GATES.values()], ids=list(GATES))


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_one_at_equal_scores_of_zero(gate: Gate, dtype: torch.dtype) -> None:
    """n * softmax(0) misses this for n = 41, 47, 49 and more."""
    for n in range(1, 129):
        gates = gate(torch.zeros(3, 2, n, dtype=dtype))
        assert gates.dtype is dtype
        assert torch.equal(gates, torch.ones(3, 2, n, dtype=dtype)), n


def test_softmax_is_exactly_one_at_any_equal_scores() -> None:
    for score in (-1000.0, -0.3, 7.7, 1e6):
        assert torch.equal(SoftmaxGate()(torch.full((41,), score)), torch.ones(41))


def test_hand_values() -> None:
    scores = torch.tensor([[0.0, math.log(3.0), -math.log(4.0)]], dtype=torch.float64)
    sigmoid = torch.tensor([[1.0, 2 * 3 / 4, 2 * 1 / 5]], dtype=torch.float64)
    softmax = 3 * torch.tensor([[1.0, 3.0, 0.25]], dtype=torch.float64) / 4.25
    torch.testing.assert_close(SigmoidGate()(scores), sigmoid, rtol=1e-14, atol=0)
    torch.testing.assert_close(SoftmaxGate()(scores), softmax, rtol=1e-14, atol=0)


@every_gate
def test_gradients(gate: Gate) -> None:
    scores = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(gate, (scores.requires_grad_(),))


@every_gate
def test_a_router_of_zeros_learns(gate: Gate) -> None:
    scores = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    gate(scores)[0, 3].backward()
    assert scores.grad is not None
    assert scores.grad[0, 3] > 0.4


@every_gate
def test_large_scores_stay_finite(gate: Gate) -> None:
    scores = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    gates = gate(scores)
    gates.sum().backward()
    assert scores.grad is not None
    assert gates.isfinite().all() and scores.grad.isfinite().all()


@every_gate
def test_a_token_looks_at_its_own_scores_only(gate: Gate) -> None:
    scores = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(scores)[2:3, 1:], gate(scores[2:3, 1:]))

"""Gates: their formulas, exactly one at equal scores of zero, and a slope there."""

from __future__ import annotations

import math

import pytest
import torch

from uoe_parallel.config.rules import GATES, load_rule
from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.gates import Gate


def gate_of(name: str) -> Gate:
    return load_rule(GATES, name)(RoutingConfig(), 5)


every_gate = pytest.mark.parametrize("gate", [gate_of(name) for name in GATES], ids=list(GATES))


def everywhere(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_one_at_equal_scores_of_zero(gate: Gate, dtype: torch.dtype) -> None:
    """n * softmax(0) misses this for n = 41, 47, 49 and more."""
    for n in range(1, 129):
        scores = torch.zeros(3, 2, n, dtype=dtype)
        gates = gate(scores, everywhere(scores))
        assert gates.dtype is dtype
        assert torch.equal(gates, torch.ones(3, 2, n, dtype=dtype)), n


def test_softmax_is_exactly_one_at_any_equal_scores() -> None:
    for score in (-1000.0, -0.3, 7.7, 1e6):
        scores = torch.full((1, 41), score)
        for name in ("softmax", "softmax_of_chosen"):
            assert torch.equal(gate_of(name)(scores, everywhere(scores)), torch.ones(1, 41))


def test_hand_values() -> None:
    scores = torch.tensor([[0.0, math.log(3.0), -math.log(4.0)]], dtype=torch.float64)
    sigmoid = torch.tensor([[1.0, 2 * 3 / 4, 2 * 1 / 5]], dtype=torch.float64)
    softmax = 3 * torch.tensor([[1.0, 3.0, 0.25]], dtype=torch.float64) / 4.25
    relu = torch.tensor([[1.0, 1 + math.log(3.0), 0.0]], dtype=torch.float64)
    wanted = {"sigmoid": sigmoid, "softmax": softmax, "softmax_of_chosen": softmax, "relu": relu}
    for name, gates in wanted.items():
        found = gate_of(name)(scores, everywhere(scores))
        torch.testing.assert_close(found, gates, rtol=1e-14, atol=0)


def test_softmax_of_chosen_by_hand() -> None:
    scores = torch.tensor([[1.0, math.log(3.0), math.log(5.0)]]).double()
    mask = torch.tensor([[False, True, True]])
    found = gate_of("softmax_of_chosen")(scores, mask)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2 * 3 / 8, 2 * 5 / 8]]).double())


def test_softmax_of_nothing_chosen_is_finite_with_its_gradient() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    gates = gate_of("softmax_of_chosen")(scores, torch.zeros(2, 3, dtype=torch.bool))
    gates.sum().backward()
    assert scores.grad is not None
    assert gates.isfinite().all() and scores.grad.isfinite().all()


@every_gate
def test_gradients(gate: Gate) -> None:
    scores = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = scores > -0.5
    assert torch.autograd.gradcheck(lambda s: gate(s, mask), (scores.requires_grad_(),))


@every_gate
def test_a_router_of_zeros_learns(gate: Gate) -> None:
    scores = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    gate(scores, everywhere(scores))[0, 3].backward()
    assert scores.grad is not None
    assert scores.grad[0, 3] > 0.4


@every_gate
def test_large_scores_stay_finite(gate: Gate) -> None:
    scores = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    gates = gate(scores, everywhere(scores))
    gates.sum().backward()
    assert scores.grad is not None
    assert gates.isfinite().all() and scores.grad.isfinite().all()


@every_gate
def test_a_token_looks_at_its_own_scores_only(gate: Gate) -> None:
    scores = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = scores > -1
    assert torch.equal(gate(scores, mask)[2:3, 1:], gate(scores[2:3, 1:], mask[2:3, 1:]))

"""Balance losses by hand, and as sums over shards of a sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.balance import Load
from uoe_parallel.routing.balance.bias import LoadBias
from uoe_parallel.routing.balance.sequence_loss import SequenceLoss
from uoe_parallel.routing.balance.z_loss import z_loss as z_loss_of


def load_balance_loss(scores_SBE: Tensor, counts_BE: Tensor, length: int) -> Tensor:
    """Of tokens that are their own units, in sequences of the given length."""
    counts_BE = counts_BE.to(scores_SBE.dtype)
    share_BE = counts_BE / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    counted_SB = torch.ones(scores_SBE.shape[:2], dtype=torch.bool)
    units_B = torch.full((scores_SBE.shape[1],), float(length))
    rule = SequenceLoss(RoutingConfig(), scores_SBE.shape[-1])
    return rule.loss(Load(scores_SBE, counted_SB, share_BE, units_B))


def z_loss(scores_SBE: Tensor, length: int) -> Tensor:
    counted_SB = torch.ones(scores_SBE.shape[:2], dtype=torch.bool)
    return z_loss_of(scores_SBE, counted_SB, torch.full((scores_SBE.shape[1],), float(length)))


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.integers(1, 32), st.integers(1, 8), st.integers(1, 4))
def test_balance_loss_is_one_a_sequence_when_even(n: int, length: int, batch: int) -> None:
    counts_BE = torch.full((batch, n), 3)
    loss = load_balance_loss(torch.zeros(length, batch, n), counts_BE, length)
    assert loss.item() == pytest.approx(batch, rel=1e-5)


def test_balance_loss_by_hand() -> None:
    # Probabilities 1/4, 3/4 and 1/2, 1/2: means 3/8 and 5/8. Shares 1/3 and 2/3.
    first = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], dtype=torch.float64)
    # All pairs to the expert that every token prefers with probability 9/10.
    second = torch.tensor([[math.log(9.0), 0.0], [math.log(9.0), 0.0]], dtype=torch.float64)
    scores_SBE = torch.stack((first, second), dim=1)
    counts_BE = torch.tensor([[1, 2], [2, 0]])
    wanted = 2 * (3 / 8 / 3 + 5 / 8 * 2 / 3) + 2 * 9 / 10
    assert load_balance_loss(scores_SBE, counts_BE, 2).item() == pytest.approx(wanted, rel=1e-12)


def test_balance_loss_is_largest_when_one_expert_takes_all() -> None:
    scores_SBE = torch.zeros(5, 1, 4)
    scores_SBE[..., 2] = 50.0
    loss = load_balance_loss(scores_SBE, torch.tensor([[0, 0, 5, 0]]), 5)
    assert loss.item() == pytest.approx(4.0)


def test_no_pair_at_all_is_no_loss() -> None:
    assert load_balance_loss(_random(3, 2, 4), torch.zeros(2, 4, dtype=torch.int64), 3).item() == 0


def test_balance_gradient_flows_through_probabilities_only() -> None:
    scores_SBE = _random(4, 2, 3).requires_grad_()
    counts_BE = torch.tensor([[1, 0, 3], [2, 2, 0]])
    load_balance_loss(scores_SBE, counts_BE, 4).backward()
    # d loss / d s_tj = n / S * p_tj (f_j - sum_i f_i p_ti), shares f held still.
    p = scores_SBE.detach().softmax(-1)
    f = counts_BE.double() / 4
    wanted = 3 / 4 * p * (f - (f * p).sum(-1, keepdim=True))
    torch.testing.assert_close(scores_SBE.grad, wanted)


def test_z_loss_by_hand() -> None:
    # Log-sum-exps log 4 and log 12, then 5 + log 4 twice.
    first = torch.tensor([[0.0] * 4, [math.log(3.0)] * 4], dtype=torch.float64)
    second = torch.full((2, 4), 5.0).double()
    scores_SBE = torch.stack((first, second), dim=1)
    wanted = (math.log(4) ** 2 + math.log(12) ** 2) / 2 + (5 + math.log(4)) ** 2
    assert z_loss(scores_SBE, 2).item() == pytest.approx(wanted, rel=1e-12)


def test_z_loss_gradient() -> None:
    scores = _random(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: z_loss(s, 3), (scores,))


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_a_sequence_add_up(shards: int) -> None:
    """With the counts of the whole sequence, as every rank of a tensor group has them."""
    scores_SBE = _random(8, 3, 4)
    counts_BE = torch.randint(1, 9, (3, 4), generator=torch.Generator().manual_seed(0))
    parts = scores_SBE.chunk(shards)
    for loss in (lambda s: load_balance_loss(s, counts_BE, 8), lambda s: z_loss(s, 8)):
        torch.testing.assert_close(torch.stack([*map(loss, parts)]).sum(), loss(scores_SBE))


def test_sequences_add_up() -> None:
    """So that a loss does not depend on how sequences are spread over ranks."""
    scores_SBE = _random(6, 4, 3)
    counts_BE = torch.randint(1, 9, (4, 3), generator=torch.Generator().manual_seed(0))
    losses = [
        load_balance_loss(scores_SBE[:, b : b + 1], counts_BE[b : b + 1], 6) for b in range(4)
    ]
    torch.testing.assert_close(
        torch.stack(losses).sum(), load_balance_loss(scores_SBE, counts_BE, 6)
    )


def test_only_tokens_that_stand_for_a_unit_count() -> None:
    scores_SBE, units_B = _random(6, 2, 3), torch.tensor([3.0, 3.0])
    counted_SB = torch.tensor([True, False] * 3).unsqueeze(1).expand(6, 2)
    share_BE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).double()
    rule = SequenceLoss(RoutingConfig(), 3)
    found = rule.loss(Load(scores_SBE, counted_SB, share_BE, units_B))
    every = torch.ones(3, 2, dtype=torch.bool)
    wanted = rule.loss(Load(scores_SBE[::2], every, share_BE, units_B))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        z_loss_of(scores_SBE, counted_SB, units_B), z_loss_of(scores_SBE[::2], every, units_B)
    )


def test_the_bias_moves_against_the_load_once_a_step() -> None:
    rule = LoadBias(RoutingConfig(bias_rate=0.25), 3)
    scores_SBE, counted_SB = torch.zeros(4, 1, 3), torch.tensor([[True], [True], [False], [True]])
    mask_SBE = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 0]]).bool().unsqueeze(1)
    for _ in range(2):  # micro-batches
        rule.observe(scores_SBE, mask_SBE, counted_SB)
        assert rule.offset().tolist() == [0, 0, 0]
    assert rule.observed.tolist() == [6, 4, 0]
    rule.move(torch.tensor([6.0, 4.0, 2.0]).double())  # with other ranks' pairs
    rule.reset()
    assert rule.offset().tolist() == [-0.25, 0, 0.25]
    assert not rule.observed.any()

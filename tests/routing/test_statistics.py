"""Running totals of a routed block."""

from __future__ import annotations

from bisect import bisect_right
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from uoe_parallel.config.rules import GATES, load_rule
from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.statistics import GATE_BINS, GATE_EDGES, RoutingStatistics


def _add(
    statistics: RoutingStatistics,
    mask_SBE: Tensor,
    gates_SBE: Tensor | None = None,
    *,
    dropped_SBE: Tensor | None = None,
    real_SB: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    gates_SBE = torch.ones(mask_SBE.shape) if gates_SBE is None else gates_SBE
    balance = torch.tensor(1.25 * factor, requires_grad=True)
    z = torch.tensor(0.5 * factor, requires_grad=True)
    statistics.add(mask_SBE, gates_SBE, dropped_SBE, balance, z, 1.5 * factor, real_SB)


def test_everything_adds_up_until_reset() -> None:
    mask_SBE = torch.tensor([[[1, 0, 1]] * 2, [[0, 0, 1], [0, 0, 0]]]).bool()
    dropped_SBE = torch.tensor([[[0, 1, 0]] * 2, [[0, 1, 0], [1, 0, 0]]]).bool()
    statistics = RoutingStatistics(3)
    assert not statistics.pack().any()
    _add(statistics, mask_SBE, dropped_SBE=dropped_SBE)
    assert statistics.counts_E.tolist() == [2, 0, 3]
    assert statistics.together_EJ.tolist() == [[2, 0, 2], [0, 0, 0], [2, 0, 3]]
    assert statistics.dropped_E.tolist() == [1, 3, 0]
    # Tokens, those with an expert, sequences, balance loss, z-loss.
    assert statistics.scalars.tolist() == [4, 3, 1.5, 1.25, 0.5]
    _add(statistics, mask_SBE[:1], factor=2)
    assert statistics.counts_E.tolist() == [4, 0, 5]
    assert statistics.dropped_E.tolist() == [1, 3, 0]
    assert statistics.gates_H.sum() == 9
    assert statistics.scalars.tolist() == [6, 5, 4.5, 3.75, 1.5]
    statistics.reset()
    assert not statistics.pack().any()


def test_padding_is_no_token() -> None:
    mask_SBE = torch.tensor([[[True]], [[False]], [[False]]])
    statistics = RoutingStatistics(1)
    _add(statistics, mask_SBE, real_SB=torch.tensor([[True], [True], [False]]))
    assert statistics.scalars[:2].tolist() == [2, 1]


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_those_of_visiting_pairs_one_by_one(gate: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scores_SBE = 3 * torch.randn(7, 5, 6, generator=generator, dtype=dtype)
    mask_SBE = scores_SBE > 1
    gates_SBE = load_rule(GATES, gate)(RoutingConfig(), 6)(scores_SBE, mask_SBE)
    # What is not chosen may hold anything.
    statistics = RoutingStatistics(6)
    _add(statistics, mask_SBE, gates_SBE.masked_fill(~mask_SBE, torch.nan))

    together, gates, routed = torch.zeros(6, 6), torch.zeros(GATE_BINS), 0
    for chosen_E, gates_E in zip(mask_SBE.view(-1, 6), gates_SBE.view(-1, 6), strict=True):
        experts = chosen_E.nonzero().flatten().tolist()
        routed += bool(experts)
        for expert in experts:
            together[expert, expert] += 1
            gates[bisect_right(GATE_EDGES, float(gates_E[expert])) - 1] += 1
        for one, other in combinations(experts, 2):
            together[one, other] += 1
            together[other, one] += 1
    assert torch.equal(statistics.together_EJ, together.double())
    assert torch.equal(statistics.gates_H, gates.double())
    assert 0 < routed < 35 and statistics.scalars[1] == routed


def test_gates_have_bins_around_one_up_to_two_and_beyond() -> None:
    assert len(GATE_EDGES) == GATE_BINS + 1
    assert all(left < right for left, right in pairwise(GATE_EDGES))
    assert {0.0, 0.5, 1.0, 2.0, 5.0, 14.0, float("inf")} <= set(GATE_EDGES)
    statistics = RoutingStatistics(1)
    gates_SBE = torch.tensor([0.0, 1.0, 1e6, 3e38]).view(4, 1, 1)
    _add(statistics, torch.ones(4, 1, 1, dtype=torch.bool), gates_SBE)
    found = statistics.gates_H.nonzero().flatten().tolist()
    assert found == [0, GATE_EDGES.index(1.0), GATE_BINS - 1]
    assert statistics.gates_H.sum() == 4


def test_totals_are_fp64_and_hold_no_graph() -> None:
    statistics = RoutingStatistics(2)
    mask_SBE = torch.ones(3, 1, 2, dtype=torch.bool)
    _add(statistics, mask_SBE, torch.ones(3, 1, 2, requires_grad=True))
    packed = statistics.pack()
    assert packed.dtype is torch.float64
    assert not packed.requires_grad


def test_large_counts_stay_exact() -> None:
    """fp32 would stop counting at 2^24."""
    statistics = RoutingStatistics(1)
    statistics.totals_X += 2.0**24
    _add(statistics, torch.ones(1, 1, 1, dtype=torch.bool))
    assert statistics.counts_E.item() == 2**24 + 1
    assert statistics.gates_H.max() == 2**24 + 1


def test_what_was_packed_does_not_change_later() -> None:
    """A metric is reduced while the next step already counts."""
    statistics = RoutingStatistics(1)
    mask_SBE = torch.ones(2, 1, 1, dtype=torch.bool)
    _add(statistics, mask_SBE)
    packed = statistics.pack()
    before = packed.clone()
    _add(statistics, mask_SBE)
    statistics.reset()
    assert torch.equal(packed, before)


def test_a_packed_vector_is_read_like_the_statistics() -> None:
    statistics = RoutingStatistics(2)
    _add(statistics, torch.tensor([[[True, False]], [[True, True]]]))
    total = RoutingStatistics(2, 2 * statistics.pack())
    assert total.counts_E.tolist() == [4, 2]
    assert total.scalars[0] == 4


def test_the_host_waits_for_nothing() -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    with FakeTensorMode():
        mask_SBE = torch.ones(4, 2, 3, dtype=torch.bool)
        statistics = RoutingStatistics(3)
        _add(statistics, mask_SBE, dropped_SBE=~mask_SBE, real_SB=torch.ones(4, 2).bool())
        with pytest.raises(RuntimeError):
            statistics.pack().sum().item()

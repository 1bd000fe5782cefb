"""Running totals of a routed block."""

from __future__ import annotations

import torch

from uoe_parallel.routing.statistics import RoutingStatistics


def _add(statistics: RoutingStatistics, mask_SBE: torch.Tensor, factor: float = 1.0) -> None:
    balance = torch.tensor(1.25 * factor, requires_grad=True)
    z = torch.tensor(0.5 * factor, requires_grad=True)
    statistics.add(mask_SBE, balance, z, sequences=1.5 * factor, dropped=int(2 * factor))


def test_counts_and_losses_add_up_until_reset() -> None:
    mask_SBE = torch.tensor([[[True, False, True]] * 2, [[False, False, True]] * 2])
    statistics = RoutingStatistics.zeros(3)
    assert statistics.pack().tolist() == [0.0] * 8
    _add(statistics, mask_SBE)
    # Pairs of each expert; tokens, dropped pairs, sequences, balance loss, z-loss.
    assert statistics.pack().tolist() == [2, 0, 4, 4, 2, 1.5, 1.25, 0.5]
    _add(statistics, mask_SBE[:1], factor=2)
    assert statistics.pack().tolist() == [4, 0, 6, 6, 6, 4.5, 3.75, 1.5]
    statistics.reset()
    assert statistics.pack().tolist() == [0.0] * 8


def test_totals_are_fp64_and_hold_no_graph() -> None:
    statistics = RoutingStatistics.zeros(2)
    _add(statistics, torch.ones(3, 1, 2, dtype=torch.bool))
    packed = statistics.pack()
    assert packed.dtype is torch.float64
    assert not packed.requires_grad


def test_large_counts_stay_exact() -> None:
    """fp32 would stop counting at 2^24."""
    statistics = RoutingStatistics.zeros(1)
    statistics.counts_E += 2.0**24
    _add(statistics, torch.ones(1, 1, 1, dtype=torch.bool))
    assert statistics.counts_E.item() == 2**24 + 1


def test_what_was_packed_does_not_change_later() -> None:
    """A metric is reduced while the next step already counts."""
    statistics = RoutingStatistics.zeros(1)
    mask_SBE = torch.ones(2, 1, 1, dtype=torch.bool)
    _add(statistics, mask_SBE)
    packed = statistics.pack()
    before = packed.clone()
    _add(statistics, mask_SBE)
    statistics.reset()
    assert torch.equal(packed, before)

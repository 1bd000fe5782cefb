"""Sizes of exchanges, planned and drawn."""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.analysis.exchange import ExchangeSizes, sample_exchange
from uoe_parallel.dispatch.plan import plan_exchange

TOKENS, EXPERTS, TOP_K, RANKS = 4000, 12, 3, 4


def _masks(seed: int) -> list[Tensor]:
    """Of four ranks: bool [3, 2, 8], one rank without a pair."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(3, 2, 8, generator=generator) < 0.3 for _ in range(RANKS)]
    masks[seed % RANKS][:] = False
    return masks


def _plan(seeds: range) -> list[ExchangeSizes]:
    groups = start(RANKS, sequence_parallel=True)
    masks = [_masks(seed)[groups.rank] for seed in seeds]
    plans = [plan_exchange(mask, groups.tensor) for mask in masks]
    return [ExchangeSizes.of_plan(plan) for plan in plans]


def test_sizes_of_masks_are_those_of_the_plan(ranks: Ranks) -> None:
    seeds = range(6)
    for rank, planned in enumerate(ranks(RANKS).run(_plan, seeds)):
        for seed, plan in zip(seeds, planned, strict=True):
            masks = _masks(seed)
            assert ExchangeSizes.of_masks(lambda p, m=masks: m[p], rank, RANKS) == plan


def _sample(rank: int, **changes: int | float | str) -> ExchangeSizes:
    arguments = {"tokens": TOKENS, "num_experts": EXPERTS, "top_k": TOP_K, "num_ranks": RANKS}
    return sample_exchange(**arguments | {"seed": 1, "rank": rank} | changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_ranks_draw_one_exchange(skew: float) -> None:
    drawn = [_sample(rank, skew=skew) for rank in range(RANKS)]
    for rank, sizes in enumerate(drawn):
        assert sizes.receive_rows == [other.send_rows[rank] for other in drawn]
        assert sizes.receive_pairs == [other.send_pairs[rank] for other in drawn]
        assert sum(sizes.send_pairs) == TOKENS * TOP_K
        assert all(r <= p for r, p in zip(sizes.send_rows, sizes.send_pairs, strict=True))


def test_even_choices_visit_as_many_ranks_as_chance_says() -> None:
    here = EXPERTS // RANKS
    visits = 1 - comb(EXPERTS - here, TOP_K) / comb(EXPERTS, TOP_K)
    sizes = _sample(2)
    for rows, pairs in zip(sizes.send_rows, sizes.send_pairs, strict=True):
        assert rows == pytest.approx(TOKENS * visits, rel=0.05)
        assert pairs == pytest.approx(TOKENS * TOP_K / RANKS, rel=0.05)


def test_skew_makes_some_experts_popular() -> None:
    even, skewed = (_sample(0, num_experts=4, top_k=1, skew=skew) for skew in (0.0, 1.0))
    shares = sorted(pairs / TOKENS for pairs in skewed.send_pairs)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert shares == pytest.approx([1 / i / harmonic for i in (4, 3, 2, 1)], rel=0.1)
    assert max(even.send_pairs) / TOKENS == pytest.approx(1 / 4, rel=0.1)


def test_draws_differ_by_seed_block_and_rank() -> None:
    first = _sample(0)
    assert first == _sample(0)
    assert first not in (_sample(0, seed=2), _sample(0, name="layers.3.attention"))
    assert first.send_pairs != _sample(1).send_pairs

"""Selections by hand. Documents, patches and segments are in tests/model/test_decisions.py."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.experts.documents import Documents
from uoe_parallel.routing.capacity import Capacity
from uoe_parallel.routing.router import Router
from uoe_parallel.routing.selection.expert_choice import ExpertChoice
from uoe_parallel.routing.selection.top_k import TopK
from uoe_parallel.routing.units import Units


def units_of(scores_SBE: Tensor, length: int = 1) -> Units:
    tokens, sequences = scores_SBE.shape[:2]
    return Units.of(Documents.whole(tokens, sequences, scores_SBE.device), length)


def top_k(k: int, scores_SBE: Tensor) -> Tensor:
    rule = TopK(RoutingConfig(top_k=k), scores_SBE.shape[-1])
    return rule(scores_SBE, units_of(scores_SBE))


# Few distinct values, so that ties are common.
score_rows = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@given(score_rows, st.data())
def test_takes_the_k_best_and_among_equals_the_lowest_index(
    rows: list[list[float]], data: st.DataObject
) -> None:
    n = len(rows[0])
    k = data.draw(st.integers(1, n))
    mask = top_k(k, torch.tensor(rows).unsqueeze(1))
    assert mask.dtype is torch.bool
    for t, row in enumerate(rows):
        best = sorted(range(n), key=lambda i: (-row[i], i))[:k]
        assert mask[t, 0].nonzero().flatten().tolist() == sorted(best)


def test_equal_scores_take_the_first_experts_at_every_width() -> None:
    """Beyond the widths where an unstable sort happens to keep the order."""
    for n in (4, 16, 17, 64, 300):
        mask = top_k(3, torch.zeros(2, 2, n))
        assert torch.equal(mask, (torch.arange(n) < 3).expand(2, 2, n))


def test_a_shard_of_the_sequence_is_enough_for_top_k() -> None:
    scores = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0))
    assert TopK.per_unit
    shards = [top_k(2, shard) for shard in scores.chunk(4)]
    assert torch.equal(torch.cat(shards), top_k(2, scores))


def test_expert_choice_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0], [3.0, -1.0], [0.0, 4.0]])
    rule = ExpertChoice(RoutingConfig(top_k=1), 2)
    mask = rule(scores.unsqueeze(1), units_of(scores.unsqueeze(1)))
    # Three of five tokens each; of the second expert's equal ones the first.
    assert mask[:, 0, 0].tolist() == [False, True, True, True, False]
    assert mask[:, 0, 1].tolist() == [True, False, True, False, True]


def test_experts_do_not_choose_what_they_may_not() -> None:
    scores = torch.full((4, 1, 2), -torch.inf)
    scores[1:3] = 0.5
    mask = ExpertChoice(RoutingConfig(top_k=2), 2)(scores, units_of(scores))
    assert mask[:, 0, 0].tolist() == [False, True, True, False]


def test_capacity_follows_the_context_and_not_the_sequence_at_hand() -> None:
    capacity = Capacity(1.5, chosen=2, num_experts=4, context=10, unit_length=3)
    assert capacity.limit == 3  # 1.5 x 2 x 4 patches / 4 experts
    mask = torch.zeros(12, 1, 4, dtype=torch.bool)
    mask[..., 1] = True
    kept = capacity(mask, units_of(mask, 3))
    assert kept[..., 1].flatten().tolist() == [True] * 9 + [False] * 3
    assert torch.equal(capacity(mask[:7], units_of(mask[:7], 3)), kept[:7])


def test_a_capacity_is_the_number_that_is_written() -> None:
    # 1.1 x 100 in binary is a little more than 110.
    assert Capacity(1.1, chosen=1, num_experts=10, context=100, unit_length=1).limit == 11


def test_shared_experts_are_spread_and_the_others_keep_their_order() -> None:
    config = RoutingConfig(shared_experts=2)
    router = Router(config, num_experts=8, context=4, causal=True)
    assert (router.num_routed, router.shared) == (6, {0, 4})
    values = torch.arange(2.0, 8.0).expand(1, 1, 6)
    whole = router.with_shared(values)
    assert whole.flatten().tolist() == [1, 2, 3, 4, 1, 5, 6, 7]
    assert torch.equal(router.without_shared(whole), values)


def test_a_router_has_the_levels_that_the_config_asks_for() -> None:
    both = RoutingConfig(segment_length=4, segment_experts=3)
    cases = [
        (RoutingConfig(), ["router_weight"]),
        (both, ["segment_router_weight", "router_weight"]),
        (both.model_copy(update={"selection": None}), ["segment_router_weight"]),
    ]
    for config, levels in cases:
        assert list(Router(config, num_experts=8, context=4, causal=True).levels) == levels

"""Top-k against sorting by hand, and the rules that a router finds by name."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.router import Router
from uoe_parallel.routing.selection import TopK


def top_k(k: int) -> TopK:
    return TopK(RoutingConfig(top_k=k))


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
    mask = top_k(k)(torch.tensor(rows).unsqueeze(1))
    assert mask.dtype is torch.bool
    for t, row in enumerate(rows):
        best = sorted(range(n), key=lambda i: (-row[i], i))[:k]
        assert mask[t, 0].nonzero().flatten().tolist() == sorted(best)


def test_equal_scores_take_the_first_experts_at_every_width() -> None:
    """Beyond the widths where an unstable sort happens to keep the order."""
    for n in (4, 16, 17, 64, 300):
        mask = top_k(3)(torch.zeros(2, 2, n))
        assert torch.equal(mask, (torch.arange(n) < 3).expand(2, 2, n))


def test_a_shard_of_the_sequence_is_enough() -> None:
    scores = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0))
    whole = top_k(2)(scores)
    assert TopK.per_token
    shards = [top_k(2)(shard) for shard in scores.chunk(4)]
    assert torch.equal(torch.cat(shards), whole)


def test_a_router_has_the_rules_that_the_config_names() -> None:
    router = Router(RoutingConfig(top_k=1, gate="sigmoid"))
    scores = torch.tensor([[[0.0, 3.0, -1.0]], [[2.0, 2.0, 2.0]]])
    assert router.select(scores).tolist() == [[[False, True, False]], [[True, False, False]]]
    torch.testing.assert_close(router.gate(scores), 2 / (1 + (-scores).exp()))
    other = Router(RoutingConfig(top_k=2, gate="softmax"))
    assert other.select(scores).sum() == 4
    torch.testing.assert_close(other.gate(scores), 3 * scores.softmax(-1))

"""Plans against the definition: lists of (token, expert) pairs, sorted by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.harness import Ranks
from tests.unions import local, start
from uoe_parallel.dispatch.plan import RoutePlan, plan_arrivals, plan_exchange, plan_local
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.documents import Documents
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.purposes import Purpose

Pair = tuple[int, int, int]
"""Position in the whole sequence, sequence, expert."""


def masks(num_ranks: int) -> st.SearchStrategy[Tensor]:
    """Routings of whole sequences, with empty ranks and experts among them."""

    def make(length: int, batch: int, per_rank: int, densities: list[float], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(length * num_ranks, batch, per_rank * num_ranks, generator=generator)
        of_tokens, of_experts = densities[:num_ranks], densities[num_ranks:]
        token_density = torch.tensor(of_tokens).repeat_interleave(length).view(-1, 1, 1)
        expert_density = torch.tensor(of_experts).repeat_interleave(per_rank)
        return chance < token_density * expert_density

    density = st.sampled_from([0.0, 0.3, 1.0])
    return st.builds(
        make,
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 3),
        st.lists(density, min_size=2 * num_ranks, max_size=2 * num_ranks),
        st.integers(0, 2**16),
    )


def _pairs(mask: Tensor, rank: int, num_ranks: int) -> list[Pair]:
    """Pairs of the experts of `rank`, by (expert, sequence, position)."""
    per_rank = mask.shape[2] // num_ranks
    pairs = [(t, b, e) for t, b, e in mask.nonzero().tolist() if e // per_rank == rank]
    return sorted(pairs, key=lambda pair: (pair[2], pair[1], pair[0]))


def _check_assignment(
    found: Assignment, pairs: list[Pair], rows: list[tuple[int, int]], experts: range, batch: int
) -> None:
    """rows: (position, sequence) of each row on the rank."""
    assert found.copies.num_rows == len(rows)
    assert found.copies.row_N.tolist() == [rows.index((t, b)) for t, b, _ in pairs]
    assert found.position_N.tolist() == [t for t, _, _ in pairs]
    assert found.expert_counts_E.tolist() == [sum(p[2] == e for p in pairs) for e in experts]
    assert found.run_lengths_G.tolist() == [
        sum(p[2] == e and p[1] == b for p in pairs) for e in experts for b in range(batch)
    ]


@settings(max_examples=40)
@given(masks(num_ranks=4), st.integers(0, 3))
def test_local_plan_lists_the_pairs_of_the_ranks_experts(mask: Tensor, rank: int) -> None:
    length, batch, num_experts = mask.shape
    per_rank = num_experts // 4
    experts = range(rank * per_rank, (rank + 1) * per_rank)
    pairs = _pairs(mask, rank, 4)
    own = mask[..., rank * per_rank : (rank + 1) * per_rank]
    documents = Documents.whole(length, batch, mask.device)
    assignment, expert_N = plan_local(own, documents)
    tokens = [(t, b) for t in range(length) for b in range(batch)]
    _check_assignment(assignment, pairs, tokens, experts, batch)
    assert assignment.token_N.tolist() == [t * batch + b for t, b, _ in pairs]
    assert expert_N.tolist() == [e - experts.start for _, _, e in pairs]


def test_runs_of_a_local_plan_are_of_documents() -> None:
    ids = torch.tensor([[2, 2, 3, 3, -1], [0, 0, 0, -1, 1]])
    mask = (ids >= 0).t().unsqueeze(-1).repeat(1, 1, 2)
    mask[2, 0, 0] = mask[0, 1, 1] = False
    assignment, expert_N = plan_local(mask, Documents.from_ids(ids))
    # Documents by number: 2, 3 and padding of the first sequence, 0, padding and 1 of the second.
    assert assignment.run_lengths_G.tolist() == [2, 1, 0, 3, 0, 1, 2, 2, 0, 2, 0, 1]
    assert assignment.expert_counts_E.tolist() == [7, 7]
    assert assignment.position_N.tolist() == [0, 1, 1, 0, 1, 2, 0, 0, 1, 0, 1, 1, 2, 0]
    assert assignment.token_N.tolist() == [0, 2, 6, 1, 3, 5, 9, 0, 2, 4, 6, 3, 5, 9]
    assert expert_N.tolist() == [0] * 7 + [1] * 7


def _plan(
    mask: Tensor, group: ProcessGroup, num_shards: int, documents: Documents
) -> tuple[RoutePlan, Assignment, Tensor]:
    """The plan of this rank's tokens, and the assignment and order of what arrives."""
    plan = plan_exchange(mask, group)
    ids = comm.all_to_all(plan.pair_ids, plan.receive_pairs, plan.send_pairs, group, Purpose.OTHER)
    shape = (mask.shape[0], mask.shape[1])
    return plan, *plan_arrivals(plan, ids, shape, num_shards, documents)


def _plan_packed(mask: Tensor, ids: Tensor, layout: ParallelLayout) -> Assignment:
    groups = start_groups(layout)
    documents = Documents.from_ids(ids)
    return _plan(local(mask, groups), groups.expert, layout.tensor, documents)[1]


def test_exchange_plan_finds_documents_across_shards_and_runs(ranks: Ranks) -> None:
    """What arrives at a rank is what a rank with all tokens would plan, but for the rows."""
    ids = torch.tensor([[2, 2, 2, 3], [-1, 4, 4, -1], [5, 6, 6, 6], [0, 0, 1, 1]])
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(4, 4, 4, generator=generator) < 0.6) & (ids >= 0).t().unsqueeze(-1)
    layout = ParallelLayout(4, 2, 1, 4, sequence_parallel=True, zero_stage=0)
    for rank, found in enumerate(ranks(4).run(_plan_packed, mask, ids, layout)):
        wanted, _ = plan_local(mask[..., rank : rank + 1], Documents.from_ids(ids))
        for name in ("token_N", "position_N", "expert_counts_E", "run_lengths_G"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def _plan_all(batch: list[Tensor], tensor: int) -> list[tuple[RoutePlan, Assignment, Tensor]]:
    groups = start(tensor, sequence_parallel=True)
    return [
        _plan(
            mask.chunk(tensor)[groups.tensor_rank].contiguous(),
            groups.tensor,
            tensor,
            Documents.whole(mask.shape[0], mask.shape[1], mask.device),
        )
        for mask in batch
    ]


def _visitors(pairs: list[Pair]) -> list[tuple[int, int]]:
    """The distinct tokens of pairs, by position, then sequence."""
    return sorted({(t, b) for t, b, _ in pairs})


def _check_exchange(mask: Tensor, of_ranks: list[tuple[RoutePlan, Assignment, Tensor]]) -> None:
    num_ranks = len(of_ranks)
    length, batch, num_experts = mask.shape
    local_length, per_rank = length // num_ranks, num_experts // num_ranks
    pairs_at = [_pairs(mask, rank, num_ranks) for rank in range(num_ranks)]

    plans = [plan for plan, _, _ in of_ranks]
    for rank, (plan, assignment, order) in enumerate(of_ranks):

        def is_here(pair: tuple[int, ...], here: int = rank) -> bool:
            return pair[0] // local_length == here

        def token(pair: tuple[int, ...], here: int = rank) -> int:
            return (pair[0] - here * local_length) * batch + pair[1]

        sent = [list(filter(is_here, _visitors(pairs))) for pairs in pairs_at]
        sent_pairs = [sorted(filter(is_here, pairs)) for pairs in pairs_at]
        assert plan.sent.num_rows == local_length * batch
        assert plan.send_rows == [len(rows) for rows in sent]
        assert plan.sent.row_N.tolist() == [token(row) for rows in sent for row in rows]
        assert plan.send_pairs == [len(pairs) for pairs in sent_pairs]
        assert plan.pair_token.tolist() == [token(p) for pairs in sent_pairs for p in pairs]
        assert plan.pair_expert.tolist() == [p[2] for pairs in sent_pairs for p in pairs]

        assert plan.receive_rows == [other.send_rows[rank] for other in plans]
        assert plan.receive_pairs == [other.send_pairs[rank] for other in plans]
        received = sorted(pairs_at[rank])
        assert [received[i] for i in order.tolist()] == pairs_at[rank]
        experts = range(rank * per_rank, (rank + 1) * per_rank)
        _check_assignment(assignment, pairs_at[rank], _visitors(pairs_at[rank]), experts, batch)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_exchange_plan_sends_each_row_once_and_sorts_what_arrives(
    ranks: Ranks, num_ranks: int
) -> None:
    @settings(max_examples=3)
    @given(st.lists(masks(num_ranks), min_size=10, max_size=15))
    def check(batch: list[Tensor]) -> None:
        by_rank = ranks(num_ranks).run(_plan_all, batch, num_ranks)
        for i, mask in enumerate(batch):
            _check_exchange(mask, [plans[i] for plans in by_rank])

    check()


def test_exchange_plan_stays_inside_its_group(ranks: Ranks) -> None:
    """Two tensor groups of two ranks plan the same exchange side by side."""
    mask = torch.rand(6, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    by_rank = ranks(4).run(_plan_all, [mask], 2)
    for first in (0, 2):
        _check_exchange(mask, [plans[0] for plans in by_rank[first : first + 2]])

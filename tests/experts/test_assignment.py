"""Pairs sorted by (expert, document, position), and rows gathered and summed by them."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from uoe_parallel.experts.assignment import Assignment, sort_pairs
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.rows import RowCopies

EXPERTS, DOCUMENTS, LENGTH = 3, 2, 5

routings = st.sets(
    st.tuples(
        st.integers(0, LENGTH - 1), st.integers(0, DOCUMENTS - 1), st.integers(0, EXPERTS - 1)
    )
)
"""(position, document, expert)."""


def _sort(pairs: list[tuple[int, int, int]]) -> tuple[Assignment, torch.Tensor]:
    """Every token of every document is a row."""
    position_N, document_N, expert_N = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).unbind(1)
    token_N = position_N * DOCUMENTS + document_N
    return sort_pairs(
        row_N=token_N,
        expert_N=expert_N,
        token_N=token_N,
        documents=Documents.whole(LENGTH, DOCUMENTS, token_N.device),
        num_rows=LENGTH * DOCUMENTS,
        num_experts=EXPERTS,
    )


@given(routings)
def test_pairs_are_sorted_by_expert_document_and_position(
    routing: set[tuple[int, int, int]],
) -> None:
    pairs = sorted(routing)
    assignment, order = _sort(pairs)
    wanted = sorted(pairs, key=lambda pair: (pair[2], pair[1], pair[0]))
    assert [pairs[i] for i in order.tolist()] == wanted
    assert assignment.position_N.tolist() == [t for t, _, _ in wanted]
    assert assignment.copies.row_N.tolist() == [t * DOCUMENTS + b for t, b, _ in wanted]
    experts, documents = range(EXPERTS), range(DOCUMENTS)
    assert assignment.expert_counts_E.tolist() == [sum(p[2] == e for p in wanted) for e in experts]
    assert assignment.run_lengths_G.tolist() == [
        sum(p[1:] == (b, e) for p in wanted) for e in experts for b in documents
    ]


@given(routings)
def test_rows_are_gathered_and_summed_with_gradients(routing: set[tuple[int, int, int]]) -> None:
    assignment, _ = _sort(sorted(routing))
    rows = assignment.copies.row_N.tolist()
    generator = torch.Generator().manual_seed(len(rows))
    x = torch.randn(LENGTH * DOCUMENTS, 3, generator=generator).requires_grad_()
    pairs = torch.randn(len(rows), 3, generator=generator).requires_grad_()
    weight = torch.randn(len(rows), 3, generator=generator)
    upstream = torch.randn(x.shape, generator=generator)

    gathered = assignment.gather(x)
    assert gathered.shape == pairs.shape
    assert all(torch.equal(gathered[i], x[row]) for i, row in enumerate(rows))
    gathered.backward(weight)
    for row in range(x.shape[0]):
        grad = sum((weight[i] for i, r in enumerate(rows) if r == row), torch.zeros(3))
        assert x.grad is not None
        torch.testing.assert_close(x.grad[row], grad)

    summed = assignment.copies.sum(pairs)
    summed.backward(upstream)
    assert pairs.grad is not None
    for row in range(x.shape[0]):
        total = sum((pairs[i] for i, r in enumerate(rows) if r == row), torch.zeros(3))
        torch.testing.assert_close(summed[row], total)
    assert all(torch.equal(pairs.grad[i], upstream[row]) for i, row in enumerate(rows))


def test_a_row_is_summed_in_the_order_of_its_experts() -> None:
    """Bits must not depend on which rank computes what: 1e8 + 1 - 1e8 is not 1e8 - 1e8 + 1."""
    assignment, _ = _sort([(0, 0, e) for e in range(EXPERTS)])
    for values in ([1e8, 1.0, -1e8], [1e8, -1e8, 1.0]):
        pairs = torch.tensor(values).unsqueeze(1)
        wanted = (torch.tensor(values[0]) + values[1] + values[2]).item()
        assert assignment.copies.sum(pairs)[0].item() == wanted


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=9), st.one_of(st.none(), st.integers(1, 12))
)
@example([5, 0], 3)  # an expert without pairs behind one that fills a chunk
def test_chunks_have_every_expert_once_and_no_more_pairs_than_they_may(
    counts: list[int], most: int | None
) -> None:
    total = sum(counts)
    assignment = Assignment(
        copies=RowCopies(torch.zeros(total, dtype=torch.int64), 1),
        expert_counts_E=torch.tensor(counts),
        token_N=torch.zeros(total, dtype=torch.int64),
        documents=Documents.whole(1, 1, torch.device("cpu")),
    )
    chunks = assignment.chunks(most)
    experts = [range(len(counts))[chunk.experts] for chunk in chunks]
    assert [e for of_chunk in experts for e in of_chunk] == list(range(len(counts)))
    pairs = [range(total)[chunk.pairs] for chunk in chunks]
    assert [n for of_chunk in pairs for n in of_chunk] == list(range(total))
    for chunk, of_chunk, own in zip(chunks, experts, pairs, strict=True):
        assert chunk.counts_E.tolist() == [counts[e] for e in of_chunk]
        assert len(own) == sum(chunk.counts_E.tolist())
        assert most is None or len(own) <= most or len(of_chunk) == 1

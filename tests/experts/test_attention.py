"""What a token attends to: its own document, and nothing else to the bit; and what documents tell
attention of their tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.unions import AttentionSpec, Problem, build, start
from uoe_parallel.dispatch.dispatcher import run_replicated
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.backends import GroupedBackend, ReferenceBackend
from uoe_parallel.experts.documents import Documents
from uoe_parallel.routing.router import Routing

SPECS = [
    AttentionSpec(causal=causal, keys_and_values=keys, queries_per_expert=2, bias=bias)
    for causal, bias in ((True, False), (False, True))
    for keys in ("selected", "all")
]
IDS = torch.tensor([[4, 4, 4, 9, 9, 9, 9, -1], [-1, 3, 3, 3, 5, -1, -1, 6]])
FIRST = IDS.t() == 4
"""Tokens of the first document."""


@torch.no_grad()
def _change_around_a_document(spec: AttentionSpec) -> None:
    """Other documents of its row, other rows, and padding that is not even a number."""
    problem = Problem(spec, 8, 2, (0.7,), (1.0, 0.5, 0.8, 0.2))
    groups = start(1, sequence_parallel=False)
    union = build(problem, groups, backend=ReferenceBackend())
    t, documents = problem.tensors(), Documents.from_ids(IDS)
    padding = IDS.t() < 0

    def outputs(x: Tensor, mask: Tensor) -> list[Tensor]:
        """Of the routed union, and of the dense one."""
        routing = Routing(mask & ~padding.unsqueeze(-1), t.gates)
        experts = partial(union, documents=documents)
        routed = run_replicated(x, routing, experts, groups.tensor, documents)
        return [routed, union(x, documents=documents)]

    x, mask = t.x.flip(0), t.mask.flip(2)
    x[padding] = torch.nan
    x[FIRST], mask[FIRST] = t.x[FIRST], t.mask[FIRST]
    for y, changed in zip(outputs(t.x, t.mask), outputs(x, mask), strict=True):
        assert torch.equal(y[FIRST], changed[FIRST])
        assert not torch.equal(y[IDS.t() == 9], changed[IDS.t() == 9])
        assert torch.equal(changed[padding], torch.zeros_like(changed[padding]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_bit_depends_on_what_is_beside_a_document(ranks: Ranks, spec: AttentionSpec) -> None:
    ranks(1).run(_change_around_a_document, spec)


def test_real_tokens_are_listed_by_document() -> None:
    documents = Documents.from_ids(IDS)
    rows, lengths = documents.real_tokens
    assert rows.tolist() == [2 * s for s in range(7)] + [2 * s + 1 for s in (1, 2, 3, 4, 7)]
    assert lengths.tolist() == [3, 4, 0, 0, 3, 1, 0, 1]
    whole_rows, whole_lengths = Documents.whole(3, 2, IDS.device).real_tokens
    assert whole_rows.tolist() == [0, 2, 4, 1, 3, 5]
    assert whole_lengths.tolist() == [3, 3]


def test_counts_of_documents_are_summed_by_sequence() -> None:
    documents = Documents.from_ids(IDS)
    counts_EC = torch.tensor([[1, 2, 0, 0, 4, 8, 0, 16], [0, 1, 0, 0, 0, 0, 0, 1]])
    assert documents.sum_by_sequence(counts_EC).tolist() == [[3, 28], [1, 1]]


def test_a_step_is_a_token_of_each_sequence() -> None:
    step = Documents.step(torch.tensor([5, 0, 2]))
    assert step.shape == (1, 3) and step.count == 3
    assert step.position_SB.tolist() == [[5, 0, 2]]
    assert step.real_tokens[0].tolist() == [0, 1, 2]
    assert step.sum_by_sequence(torch.tensor([[1, 0, 1]])).tolist() == [[1, 0, 1]]


def _count_gathers(spec: AttentionSpec) -> list[int]:
    """In forward and in backward."""
    problem = Problem(spec, 8, 2, (0.7,), (1.0, 0.5, 0.8, 0.2))
    groups = start(1, sequence_parallel=False)
    union = build(problem, groups, torch.float32, GroupedBackend())
    t, documents = problem.tensors(torch.float32), Documents.whole(8, 2, torch.device("cpu"))
    counts = [0]
    gather = Assignment.gather

    def counted(assignment: Assignment, rows: Tensor) -> Tensor:
        counts[-1] += 1
        return gather(assignment, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assignment, "gather", counted)
        routing = Routing(t.mask, t.gates)
        experts = partial(union, documents=documents)
        y = run_replicated(t.x.requires_grad_(), routing, experts, groups.tensor, documents)
        counts.append(0)
        y.backward(t.upstream)
    return counts


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_gathered_rows_are_not_kept_for_backward(ranks: Ranks, spec: AttentionSpec) -> None:
    """They are gathered again, once. That gradients are right is for the tests of unions."""
    assert ranks(1).run(_count_gathers, spec) == [[1, 1]]

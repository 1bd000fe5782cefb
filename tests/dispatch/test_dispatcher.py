"""Routed blocks over ranks: right, each pair computed once, each row sent once, whatever the
routing. Rank functions take whole batches of problems, so that a property is one call."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Ranks
from tests.unions import (
    ROPE_BASE,
    AttentionSpec,
    MLPSpec,
    Outcome,
    Problem,
    Spec,
    assert_equal_to,
    expected_routed,
    layout_id,
    local,
    run_experts,
    run_routed,
)
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.documents import Documents
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.routing.router import Routing

LAYOUTS = [
    ParallelLayout(world, tensor, 1, tensor, sequence_parallel=sharded, zero_stage=0)
    for world, tensor in [(1, 1), (2, 2), (4, 4), (4, 2)]
    for sharded in (False, True)
    if tensor > 1 or not sharded
]
WIDE = [
    ParallelLayout(world, tensor, 1, world, sequence_parallel=tensor > 1, zero_stage=0)
    for world, tensor in [(2, 1), (4, 1), (4, 2)]
]
LAYOUTS += WIDE
SHARDED = [layout for layout in LAYOUTS if layout.sequence_parallel] + WIDE[:2]
REPLICATED = [layout for layout in LAYOUTS if layout.tensor > 1 and not layout.sequence_parallel]

SPECS: list[Spec] = [
    MLPSpec(activation="gelu", num_experts=4),
    MLPSpec(activation="swiglu", num_experts=8, bias=False),
    AttentionSpec(num_experts=4),
    AttentionSpec(num_experts=4, queries_per_expert=2, bias=False, head_width=2),
]
TOKENS_AND_EXPERTS = {
    "half of the pairs": ((1.0,) * 4, (0.5,) * 4),
    "all pairs": ((1.0,) * 4, (1.0,) * 4),
    "no token routed": ((0.0,) * 4, (1.0,) * 4),
    "all tokens to one expert": ((1.0,) * 4, (0.0, 0.0, 1.0, 0.0)),
    "last rank's experts get nothing": ((1.0,) * 4, (0.5, 0.5, 0.0, 0.0)),
    "first ranks send nothing": ((0.0, 0.0, 1.0, 1.0), (0.5,) * 4),
    "last rank sends nothing, first receives nothing": ((1.0, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 1.0)),
    "skewed": ((1.0, 0.3, 0.1, 0.05), (1.0, 0.1, 0.1, 0.05)),
}


def _problem(spec: Spec, case: str, seed: int) -> Problem:
    stretches, experts = TOKENS_AND_EXPERTS[case]
    per_expert = spec.num_experts // len(experts)
    densities = tuple(density for density in experts for _ in range(per_expert))
    return Problem(spec, 8, 4, stretches, densities, seed)


NAMED = [
    _problem(spec, case, seed) for seed, spec in enumerate(SPECS) for case in TOKENS_AND_EXPERTS
]
PACKED_CASES = ("half of the pairs", "first ranks send nothing", "last rank's experts get nothing")
VARIANTS: list[Spec] = [
    AttentionSpec(causal=False),
    AttentionSpec(keys_and_values="all", queries_per_expert=2, head_width=2),
    AttentionSpec(keys_and_values="all", causal=False, bias=False),
]
NAMED_VARIANTS = [
    *(_problem(spec, case, 7) for spec in VARIANTS for case in ("half of the pairs", "skewed")),
    *(_problem(spec, "no token routed", 7) for spec in VARIANTS[1:2]),
    *(
        replace(_problem(spec, case, seed), packed=True)
        for seed, spec in enumerate([SPECS[0], *SPECS[2:], *VARIANTS])
        for case in PACKED_CASES
    ),
]
NAMED_MLP = [problem for problem in NAMED if isinstance(problem.spec, MLPSpec)]


@st.composite
def problems(draw: st.DrawFn, layout: ParallelLayout) -> Problem:
    densities = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    ranks = layout.tensor
    num_experts = layout.expert * draw(st.integers(1, 3))
    spec = draw(
        st.one_of(
            st.builds(
                MLPSpec,
                num_experts=st.just(num_experts),
                activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
                bias=st.booleans(),
                hidden_size=st.integers(1, 5),
                expert_width=st.integers(1, 5),
            ),
            st.builds(
                AttentionSpec,
                num_experts=st.just(num_experts),
                queries_per_expert=st.integers(1, 2),
                bias=st.booleans(),
                head_width=st.sampled_from([2, 4]),
                causal=st.booleans(),
                keys_and_values=st.sampled_from(["selected", "all"]),
                rope_base=st.sampled_from([ROPE_BASE, None]),
            ),
        )
    )
    return Problem(
        spec,
        length=ranks * draw(st.integers(1, 3)),
        batch=layout.expert // ranks * draw(st.integers(1, 3)),
        stretch_density=tuple(draw(st.lists(densities, min_size=ranks, max_size=ranks))),
        expert_density=tuple(draw(st.lists(densities, min_size=num_experts, max_size=num_experts))),
        seed=draw(st.integers(0, 2**16)),
        packed=draw(st.booleans()),
    )


def batches_of_problems(layout: ParallelLayout) -> st.SearchStrategy[list[Problem]]:
    return st.lists(problems(layout), min_size=8, max_size=10)


few_batches = settings(
    max_examples=2,
    # A failing batch is reported as it is: shrinking runs it again and again.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _solve_all(batch: list[Problem], layout: ParallelLayout) -> list[Outcome]:
    groups = start_groups(layout)
    return [run_routed(problem, groups) for problem in batch]


def _check_solutions(ranks: Ranks, batch: list[Problem], layout: ParallelLayout) -> None:
    by_rank = ranks(layout.world_size).run(_solve_all, batch, layout)
    for i, problem in enumerate(batch):
        outcomes = [found[i] for found in by_rank]
        assert_equal_to(expected_routed(problem), outcomes, layout, problem)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_named_routings_equal_the_reference(ranks: Ranks, layout: ParallelLayout) -> None:
    _check_solutions(ranks, NAMED, layout)


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *REPLICATED[:1], *SHARDED[:2], *WIDE], ids=layout_id
)
def test_documents_directions_and_all_keys_equal_the_reference(
    ranks: Ranks, layout: ParallelLayout
) -> None:
    _check_solutions(ranks, NAMED_VARIANTS, layout)


@pytest.mark.parametrize("layout", [*REPLICATED[:1], *SHARDED[:2], *WIDE[::2]], ids=layout_id)
def test_any_routing_equals_the_reference(ranks: Ranks, layout: ParallelLayout) -> None:
    @few_batches
    @given(batches_of_problems(layout))
    def check(batch: list[Problem]) -> None:
        _check_solutions(ranks, batch, layout)

    check()


@dataclass(frozen=True)
class Visit:
    """One (token, expert) pair as the experts of a rank saw it."""

    token: int
    position: int
    sequence: int
    expert: int


@dataclass(frozen=True)
class Trace:
    """What one rank computed and sent."""

    visits: list[Visit]
    rows: list[int]
    """Token of each row that was present on the rank."""
    collectives: list[tuple[str, tuple[int, ...], list[int] | None]]
    """Name, shape of a row of the input and rows for each rank, in order."""


class _Collectives(TorchDispatchMode):
    """Records every collective, backward included, at the point all of them pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], list[int] | None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name == "alltoall_base_":
                _output, sent, _group, _receive_rows, send_rows, *_ = args
                self.calls.append((name, tuple(sent.shape[1:]), list(send_rows)))
            else:
                self.calls.append((name, (), None))
        return func(*args, **(kwargs or {}))


class _RecordingExperts:
    """Experts that return their rows as they are, and remember for whom they worked."""

    def __init__(self, first_expert: int) -> None:
        self.first_expert = first_expert
        self.visits: list[Visit] = []
        self.rows: list[int] = []

    def __call__(self, rows: Tensor, gates_N: Tensor, assignment: Assignment) -> Tensor:
        self.rows = rows[:, 0].long().tolist()
        pairs = assignment.gather(rows)
        counts_E, lengths_G = assignment.expert_counts_E, assignment.run_lengths_G
        batch = lengths_G.shape[0] // counts_E.shape[0]
        run_N = torch.repeat_interleave(lengths_G)
        expert_N = torch.repeat_interleave(counts_E)
        assert torch.equal(run_N // batch, expert_N)
        self.visits = [
            Visit(int(token), position, run % batch, self.first_expert + expert)
            for token, position, run, expert in zip(
                pairs[:, 0].tolist(),
                assignment.position_N.tolist(),
                run_N.tolist(),
                expert_N.tolist(),
                strict=True,
            )
        ]
        return assignment.copies.sum(pairs * gates_N.unsqueeze(1))


def _trace_all(
    batch: list[Problem], layout: ParallelLayout, needs_all_rows: bool = False
) -> list[Trace]:
    """Rows carry the number of their token, position * batch + sequence. Each sequence counts as a
    document, so that runs tell sequences."""
    groups = start_groups(layout)
    traces = []
    for problem in batch:
        t = problem.tensors()
        token = torch.arange(problem.length * problem.batch).view(problem.length, problem.batch, 1)
        x = local(token.expand(-1, -1, 3).double(), groups).requires_grad_()
        gates = local(t.gates, groups).requires_grad_()
        experts = _RecordingExperts(groups.expert.rank() * t.mask.shape[2] // layout.expert)
        documents = Documents.whole(problem.length, problem.batch, x.device)
        with _Collectives() as collectives:
            routing = Routing(local(t.mask, groups), gates)
            y = run_experts(x, routing, experts, groups, documents, needs_all_rows=needs_all_rows)
            y.backward(torch.ones_like(y))
        traces.append(Trace(experts.visits, experts.rows, collectives.calls))
    return traces


def _check_conservation(batch: list[Problem], traces: list[list[Trace]]) -> None:
    """Every routed pair is computed once, at its own place, and nothing else is."""
    for i, problem in enumerate(batch):
        routed = [
            Visit(position * problem.batch + sequence, position, sequence, expert)
            for position, sequence, expert in problem.tensors().mask.nonzero().tolist()
        ]
        computed = [visit for of_rank in traces for visit in of_rank[i].visits]
        assert Counter(computed) == Counter(routed), problem


def _rows_to_send(problem: Problem, layout: ParallelLayout) -> list[list[set[int]]]:
    """[source][destination]: the source's tokens with an expert at the destination."""
    num_ranks, shards = layout.expert, layout.tensor
    rows: list[list[set[int]]] = [[set() for _ in range(num_ranks)] for _ in range(num_ranks)]
    for position, sequence, expert in problem.tensors().mask.nonzero().tolist():
        source = position // (problem.length // shards)
        source += sequence // (problem.batch * shards // num_ranks) * shards
        destination = expert // (problem.spec.num_experts // num_ranks)
        rows[source][destination].add(position * problem.batch + sequence)
    return rows


def _check_rows(batch: list[Problem], traces: list[list[Trace]], layout: ParallelLayout) -> None:
    """A row crosses to a rank once in dispatch, once back, and its gradients likewise."""
    num_ranks = len(traces)
    for i, problem in enumerate(batch):
        rows = _rows_to_send(problem, layout)
        for rank in range(num_ranks):
            trace = traces[rank][i]
            out = [len(rows[rank][other]) for other in range(num_ranks)]
            back = [len(rows[other][rank]) for other in range(num_ranks)]
            sent = [counts for _, shape, counts in trace.collectives if shape == (3,)]
            assert sent == [out, back, out, back], problem
            present = [token for other in range(num_ranks) for token in sorted(rows[other][rank])]
            assert trace.rows == present, problem


def _shapes(calls: Iterable[tuple[str, tuple[int, ...], list[int] | None]]) -> Counter[str]:
    return Counter(f"{name}{shape}" for name, shape, _ in calls)


def _traces(ranks: Ranks, batch: list[Problem], layout: ParallelLayout) -> list[list[Trace]]:
    """Of the first expert group, by rank."""
    return ranks(layout.world_size).run(_trace_all, batch, layout)[: layout.expert]


Traces = Callable[[ParallelLayout], list[list[Trace]]]


@pytest.fixture(scope="module")
def named_traces(ranks: Ranks) -> Traces:
    """Of the named routings, made once for each layout."""
    return functools.cache(lambda layout: _traces(ranks, NAMED_MLP, layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_every_routed_pair_is_computed_once(named_traces: Traces, layout: ParallelLayout) -> None:
    _check_conservation(NAMED_MLP, named_traces(layout))


@pytest.mark.parametrize("layout", SHARDED, ids=layout_id)
def test_every_row_crosses_to_a_rank_once_each_way(
    named_traces: Traces, layout: ParallelLayout
) -> None:
    _check_rows(NAMED_MLP, named_traces(layout), layout)


@pytest.mark.parametrize("layout", SHARDED, ids=layout_id)
def test_ranks_take_part_in_the_same_collectives(
    named_traces: Traces, layout: ParallelLayout
) -> None:
    """Whatever a rank sends: counts, rows, gates with expert ids and sums, then three gradients."""
    pairs, gradients, rows = "alltoall_base_(2,)", "alltoall_base_()", "alltoall_base_(3,)"
    for of_rank in named_traces(layout):
        for trace in of_rank:
            assert _shapes(trace.collectives) == {pairs: 2, gradients: 1, rows: 4}


@pytest.mark.parametrize("layout", REPLICATED, ids=layout_id)
def test_replicated_tokens_do_not_move(named_traces: Traces, layout: ParallelLayout) -> None:
    """One sum of results, and one each of the gradients of tokens and gates."""
    for of_rank in named_traces(layout):
        for trace in of_rank:
            assert _shapes(trace.collectives) == {"allreduce_()": 3}


@pytest.mark.parametrize("layout", [SHARDED[0], *WIDE[1:]], ids=layout_id)
def test_experts_that_need_all_rows_get_them_in_order(ranks: Ranks, layout: ParallelLayout) -> None:
    """Rows are gathered and sums scattered, the other way round in backward; masks and gates, of a
    rank's own experts, and gradients of gates are exchanged. Also by ranks without a pair."""
    traces = ranks(layout.world_size).run(_trace_all, NAMED_MLP, layout, True)
    _check_conservation(NAMED_MLP, traces)
    for of_rank in traces:
        for problem, trace in zip(NAMED_MLP, of_rank, strict=True):
            assert trace.rows == list(range(problem.length * problem.batch))
            names = Counter(name for name, _, _ in trace.collectives)
            assert names == {"_allgather_base_": 2, "_reduce_scatter_base_": 2, "alltoall_base_": 3}


@pytest.mark.parametrize("layout", [*SHARDED[:2], *WIDE[::2]], ids=layout_id)
def test_any_routing_computes_pairs_once_and_sends_rows_once(
    ranks: Ranks, layout: ParallelLayout
) -> None:
    @few_batches
    @given(batches_of_problems(layout))
    def check(batch: list[Problem]) -> None:
        traces = _traces(ranks, batch, layout)
        _check_conservation(batch, traces)
        _check_rows(batch, traces, layout)

    check()

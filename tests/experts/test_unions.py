"""The union of all experts is the dense block: values, gradients and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.harness import Ranks
from tests.unions import (
    AttentionSpec,
    MLPSpec,
    Outcome,
    Problem,
    Spec,
    assert_equal_to,
    build,
    expected_dense,
    layout_id,
    local,
    named_weights,
    start,
    weight_gradients,
)
from uoe_parallel.config.rules import GATES
from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.routing.router import Router

SPECS: list[Spec] = [
    MLPSpec(activation="gelu", bias=False),
    MLPSpec(activation="gelu", bias=True),
    MLPSpec(activation="gelu_tanh", bias=True),
    MLPSpec(activation="swiglu", bias=False),
    MLPSpec(activation="swiglu", bias=True, num_experts=8),
    AttentionSpec(bias=False),
    AttentionSpec(bias=True),
    AttentionSpec(bias=False, queries_per_expert=2),
    AttentionSpec(bias=True, queries_per_expert=3, num_experts=8, head_width=2),
    AttentionSpec(bias=True, queries_per_expert=2, causal=False),
    AttentionSpec(bias=True, queries_per_expert=2, head_width=2, keys_and_values="all"),
    AttentionSpec(bias=False, causal=False, keys_and_values="all"),
    AttentionSpec(bias=True, head_width=3, rope_base=None),
    AttentionSpec(bias=False, queries_per_expert=2, rope_base=None, keys_and_values="all"),
]
PROBLEMS = [
    Problem(spec, length=8, batch=2, stretch_density=(1.0,), expert_density=(1.0,) * n, seed=seed)
    for seed, spec in enumerate(SPECS)
    for n in [spec.num_experts]
]
PACKED = [replace(problem, packed=True) for problem in PROBLEMS[6:]]
Cases = list[tuple[Problem, tuple[str, ...]]]
LAYOUTS = [
    ParallelLayout(1, 1, 1, 1, sequence_parallel=False, zero_stage=0),
    ParallelLayout(2, 2, 1, 2, sequence_parallel=False, zero_stage=0),
    ParallelLayout(2, 2, 1, 2, sequence_parallel=True, zero_stage=0),
    ParallelLayout(4, 4, 1, 4, sequence_parallel=False, zero_stage=0),
    ParallelLayout(4, 4, 1, 4, sequence_parallel=True, zero_stage=0),
]


def _cases(layout: ParallelLayout) -> Cases:
    """Problems, and the gates with which each is routed: on several ranks, where a gate does what
    it does on one, they take turns."""
    gates = tuple(GATES)
    turns = [(gates[turn % len(gates)],) for turn in range(len(PROBLEMS))]
    routed = [gates] * len(PROBLEMS) if layout.world_size == 1 else turns
    packed: Cases = [(problem, ("sigmoid",)) for problem in PACKED]
    return [*zip(PROBLEMS, routed, strict=True), *packed]


def _dense_block(problem: Problem, groups: ParallelGroups) -> DenseBlock:
    sharded = groups.layout.sequence_parallel
    return DenseBlock(build(problem, groups), group=groups.tensor, sequence_parallel=sharded)


def _all_on(problem: Problem, groups: ParallelGroups, gate: str) -> RoutedBlock:
    """A router of zeros with every expert chosen."""
    num_experts = problem.spec.num_experts
    routing = RoutingConfig(top_k=num_experts, gate=gate)
    return RoutedBlock(
        build(problem, groups),
        routing,
        Router(routing, num_experts=num_experts, context=problem.length, causal=True),
        hidden_size=problem.spec.hidden_size,
        dtype=torch.float64,
        router_init=lambda _: torch.zero_,
        loss_weight_per_sequence=1.0,
        group=groups.tensor,
        expert_group=groups.expert,
        data_group=groups.data,
        sequence_parallel=groups.layout.sequence_parallel,
    )


def _run(block: DenseBlock, problem: Problem, groups: ParallelGroups) -> Outcome:
    t = problem.tensors()
    x = local(t.x, groups).requires_grad_()
    y = block(x, problem.context(groups))
    y.backward(local(t.upstream, groups))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **weight_gradients(block.experts, groups)}  # pyright: ignore[reportArgumentType]


def _run_all(layout: ParallelLayout) -> list[dict[str, Outcome]]:
    """Each problem by Megatron's dense linears, and routed with each gate."""
    groups = start(layout.tensor, sequence_parallel=layout.sequence_parallel)
    return [
        {
            "dense": _run(_dense_block(problem, groups), problem, groups),
            **{gate: _run(_all_on(problem, groups, gate), problem, groups) for gate in gates},
        }
        for problem, gates in _cases(layout)
    ]


def _round_trip(layout: ParallelLayout) -> list[Outcome]:
    groups = start(layout.tensor, sequence_parallel=layout.sequence_parallel)
    return [named_weights(build(problem, groups).to_dense()) for problem in PROBLEMS]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_all_experts_with_gates_of_one_are_the_dense_block(
    ranks: Ranks, layout: ParallelLayout
) -> None:
    """Padding does not come out of attention, dense or routed, but for the output bias."""
    by_rank = ranks(layout.world_size).run(_run_all, layout)
    for i, (problem, gates) in enumerate(_cases(layout)):
        assert problem.packed == bool((problem.tensors().ids < 0).any())
        for path in ("dense", *gates):
            found = [outcomes[i][path] for outcomes in by_rank]
            assert_equal_to(expected_dense(problem), found, layout, (path, problem))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_dense_weights_survive_a_round_trip_exactly(ranks: Ranks, tensor: int) -> None:
    layout = ParallelLayout(tensor, tensor, 1, tensor, sequence_parallel=False, zero_stage=0)
    for outcomes in ranks(tensor).run(_round_trip, layout):
        for problem, found in zip(PROBLEMS, outcomes, strict=True):
            full = named_weights(problem.tensors().weights)
            assert found.keys() == full.keys()
            for name in full:
                assert torch.equal(found[name], full[name]), (problem, name)


@pytest.mark.parametrize("problem", PROBLEMS + PACKED, ids=lambda problem: str(problem.spec))
def test_references_agree_with_each_other(problem: Problem) -> None:
    """The dense reference knows no experts, the routed one visits them one by one."""
    t = problem.tensors()
    assert t.mask.all() or problem.packed
    ones = torch.ones_like(t.gates)
    routed = problem.spec.routed(t.x, t.ids, t.mask, ones, t.weights)
    torch.testing.assert_close(routed, expected_dense(problem)["y"], rtol=1e-9, atol=1e-11)

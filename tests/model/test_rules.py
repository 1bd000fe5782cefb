"""What must hold of blocks under every routing rule: causality, independence of other documents and
sequences, slopes of routers, dense twins, conservation (UoE 6.1 to 6.4, 6.6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, own_shard, random_tokens, start
from tests.model.rules import BIDIRECTIONAL_RULES, CAUSAL_RULES, packed
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.backends import Backend, LoopBackend, ReferenceBackend
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.context import Context
from uoe_parallel.routing.router import Routing

KINDS = ("feed_forward", "attention")
BACKENDS: dict[str, Backend] = {"loop": LoopBackend(), "reference": ReferenceBackend()}
LENGTH, BATCH = 16, 4
SPLIT, END = 7, 15
"""Where the second document of the changed row begins, as changes of later tokens do, and ends."""
ROW = 2
COMBINED = [
    pytest.param({}, "loop", id="one-loop"),
    pytest.param({}, "reference", id="one-reference"),
    pytest.param({"tensor": 2}, "reference", id="sharded-reference"),
    # Less exact than the one before, and by code that both of the others have run.
    pytest.param({"tensor": 2}, "loop", id="sharded-loop", marks=pytest.mark.slow),
]
IDS = packed(LENGTH, [[5, 11], [16], [SPLIT, END - SPLIT], [1, 2, 12]])


QUERIES: dict[str, dict[str, Any]] = {
    "queries only": {"keys_and_values": "all"},
    "queries only, by patches": {"keys_and_values": "all", "patch_length": 3},
}
"""In attention; the feed-forward routes as without it."""
CAUSAL = CAUSAL_RULES | QUERIES
BIDIRECTIONAL = BIDIRECTIONAL_RULES | QUERIES


def config_of(rule: dict[str, Any], parallel: dict[str, Any], task: str) -> RunConfig:
    feed_forward = {name: value for name, value in rule.items() if name != "keys_and_values"}
    return tiny_config(
        model={"task": task}, feed_forward=feed_forward, attention=rule, parallel=parallel
    )


Found = tuple[Tensor, Tensor, Tensor]
"""Mask, gates and output of this rank's tokens."""


def route_and_run(block: RoutedBlock, x: Tensor, context: Context) -> Found:
    with torch.no_grad():
        decisions = block._decide(x, context)
        routing: Routing = block._routing(decisions, context.documents)
        return routing.mask_SBE, routing.gates_SBE, block(x, context)


def before_and_after(
    rules: dict[str, dict[str, Any]], parallel: dict[str, Any], task: str, backend: str
) -> dict[tuple[str, str, str], tuple[Found, Found]]:
    """By rule, kind of block and change: a block in fp64 before and after the change."""
    generator = torch.Generator().manual_seed(11)
    groups = start(tiny_config(parallel=parallel))
    found = {}
    for name, rule in rules.items():
        config = config_of(rule, parallel, task)
        model = build_model(config, groups, torch.float64, BACKENDS[backend])
        shape = (LENGTH, BATCH, config.model.hidden_size)
        before = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        for kind in KINDS:
            block = model.routed_blocks()[f"layers.0.{kind}"]
            for change, (ids, where) in CHANGES.items():
                after = before.clone()
                after[where] += noise[where]
                context = model.context((BATCH, LENGTH), ids, before.device)
                found[name, kind, change] = (
                    route_and_run(block, own_shard(before, groups), context),
                    route_and_run(block, own_shard(after, groups), context),
                )
    return found


CHANGES: dict[str, tuple[Tensor | None, tuple[slice | int, ...]]] = {
    "later tokens": (None, (slice(SPLIT, None),)),
    "another sequence": (None, (slice(None), ROW)),
    "a document behind": (IDS, (slice(SPLIT, END), ROW)),
    "a document before": (IDS, (slice(None, SPLIT), ROW)),
    "padding": (IDS, (slice(END, None), ROW)),
}
"""Documents, and which hidden states change."""


def kept(change: str) -> Tensor:
    """Which tokens must not change: bool [S, B]."""
    _, where = CHANGES[change]
    same = torch.ones(LENGTH, BATCH, dtype=torch.bool)
    same[where] = False
    return same


def check(
    results: list[dict[tuple[str, str, str], tuple[Found, Found]]], exact: bool, changes: list[str]
) -> None:
    for case in results[0]:
        if case[2] not in changes:
            continue
        shards = [result[case] for result in results]
        same = kept(case[2])
        before, after = (
            [torch.cat(parts) for parts in zip(*(shard[i] for shard in shards), strict=True)]
            for i in (0, 1)
        )
        for old, new in zip(before[:2], after[:2], strict=True):
            assert torch.equal(old[same], new[same]), case
        if case[2] != "padding":  # which nothing is routed by
            assert not torch.equal(before[1], after[1]), f"{case}: the router must see the change"
        if exact:
            assert torch.equal(before[2][same], after[2][same]), case
        difference = (before[2][same] - after[2][same]).abs().max()
        assert difference <= 1e-12, case


@pytest.mark.parametrize(("parallel", "backend"), COMBINED)
def test_nothing_later_and_nothing_beside_changes_a_causal_block(
    ranks: Ranks, parallel: dict[str, Any], backend: str
) -> None:
    case = (CAUSAL, parallel, "next_token", backend)
    results = ranks(parallel.get("tensor", 1)).run(before_and_after, *case)
    check(results, backend == "reference", list(CHANGES))


@pytest.mark.parametrize(("parallel", "backend"), COMBINED)
def test_nothing_beside_changes_a_bidirectional_block(
    ranks: Ranks, parallel: dict[str, Any], backend: str
) -> None:
    case = (BIDIRECTIONAL, parallel, "masked_token", backend)
    results = ranks(parallel.get("tensor", 1)).run(before_and_after, *case)
    check(results, backend == "reference", [c for c in CHANGES if c != "later tokens"])


def router_gradients(
    rules: dict[str, dict[str, Any]], task: str
) -> dict[tuple[str, str, str], tuple[Tensor, Tensor]]:
    """By rule, block and level: whether an expert was chosen by what has a slope, and the norm of
    its router column's gradient, without balance losses, which reach every column by themselves."""
    groups = start(tiny_config())
    found = {}
    for rule, fields in rules.items():
        config = config_of(fields | {"balance_loss": 0.0, "z_loss": 0.0}, {}, task)
        model = build_model(config, groups)
        chosen = {}

        def remember(block: RoutedBlock, name: str, chosen: dict[str, Any] = chosen) -> None:
            original = block._routing

            def routing(decisions: Any, documents: Any) -> Routing:
                chosen[name] = decisions
                return original(decisions, documents)

            block._routing = routing

        blocks = model.routed_blocks()
        for name, block in blocks.items():
            remember(block, name)
        model.hidden(random_tokens(config)).square().mean().backward()
        for name, block in blocks.items():
            for weight, decision in zip(block.router.levels, chosen[name], strict=True):
                gradient = block.get_parameter(weight).grad
                assert gradient is not None
                slope_SBE = decision.mask_SBE
                if block.routing.gate == "relu":
                    slope_SBE = slope_SBE & (decision.judged.scores_SBE > -1)
                if decision.judged.known_SB is not None:
                    slope_SBE = slope_SBE & decision.judged.known_SB.unsqueeze(-1)
                found[rule, name, weight] = slope_SBE.any((0, 1)), gradient.norm(dim=1)
    return found


@pytest.mark.parametrize(
    ("rules", "task"),
    [(CAUSAL, "next_token"), (BIDIRECTIONAL, "masked_token")],
    ids=["causal", "bidirectional"],
)
def test_router_column_of_every_chosen_expert_has_a_gradient(
    ranks: Ranks, rules: dict[str, dict[str, Any]], task: str
) -> None:
    found = ranks(1).run(router_gradients, rules, task)[0]
    assert len(found) >= 4 * len(rules)
    for case, (chosen_E, norms_E) in found.items():
        assert chosen_E.any(), case
        assert (norms_E[chosen_E] > 0).all(), case


EVERYTHING: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 4},
    "threshold in its warm-up": {"selection": "threshold", "threshold_warmup": 1},
    "patches": {"top_k": 4, "patch_length": 3},
    "segments": {"selection": None, "segment_length": 4, "segment_experts": 4},
    "segments, then patches": {"top_k": 4, "segment_length": 4, "segment_experts": 4},
    "shared": {"top_k": 3, "shared_experts": 1},
    "wide capacity": {"top_k": 4, "capacity_factor": 1.0},
}
"""Every way to have all four experts on."""


def dense_twins(task: str) -> dict[tuple[str, str, str], float]:
    """How far blocks with routers of zeros and all experts on are from their dense twins, values
    and gradients of x, in fp64."""
    groups = start(tiny_config())
    found = {}
    generator = torch.Generator().manual_seed(5)
    for name, rule in EVERYTHING.items():
        for gate in ("sigmoid", "softmax", "softmax_of_chosen", "relu"):
            routing = rule | {"gate": gate, "balance_loss": 0.0, "z_loss": 0.0}
            config = tiny_config(
                feed_forward=routing | {"num_experts": 4},
                attention=routing,
                model={"router_init_std": 1e-300, "task": task},
            )
            model = build_model(config, groups, torch.float64)
            for kind in KINDS:
                block = model.routed_blocks()[f"layers.0.{kind}"]
                with torch.no_grad():
                    for weight in block.router.levels:
                        block.get_parameter(weight).zero_()
                context = model.context((BATCH, LENGTH), IDS, torch.device("cpu"))
                shape = (LENGTH, BATCH, config.model.hidden_size)
                x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                real = context.documents.real_SB
                assert real is not None
                routed = block(x, context)[real]
                whole = super(RoutedBlock, block).forward(x, context)[real]
                (a,) = torch.autograd.grad(routed.sin().sum(), x)
                (b,) = torch.autograd.grad(whole.sin().sum(), x)
                pairs = [(routed, whole), (a[real], b[real])]
                found[name, gate, kind] = max(float((p - q).abs().max()) for p, q in pairs)
    return found


@pytest.mark.parametrize("task", ["next_token", "masked_token"])
def test_a_router_of_zeros_with_all_experts_is_the_dense_block(ranks: Ranks, task: str) -> None:
    found = ranks(1).run(dense_twins, task)[0]
    for case, difference in found.items():
        assert difference < 1e-12, case


def conserved(rules: dict[str, dict[str, Any]], task: str) -> dict[tuple[str, str], list[int]]:
    """By rule and block: pairs in the mask, pairs computed, and pairs of padding."""
    groups = start(tiny_config())
    found = {}
    for rule, fields in rules.items():
        config = config_of(fields, {}, task)
        model = build_model(config, groups)
        for name, block in model.routed_blocks().items():
            computed: list[int] = []

            def count(module: Any, arguments: Any, computed: list[int] = computed) -> None:
                computed.append(len(arguments[2].token_N))

            block.experts.register_forward_pre_hook(count)
            context = model.context((BATCH, LENGTH), IDS, torch.device("cpu"))
            shape = (LENGTH, BATCH, config.model.hidden_size)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            mask, _, _ = route_and_run(block, x, context)
            real = context.documents.real_SB
            assert real is not None
            found[rule, name] = [int(mask.sum()), sum(computed), int(mask[~real].sum())]
    return found


@pytest.mark.parametrize(
    ("rules", "task"),
    [(CAUSAL, "next_token"), (BIDIRECTIONAL, "masked_token")],
    ids=["causal", "bidirectional"],
)
def test_every_pair_is_computed_once_and_padding_never(
    ranks: Ranks, rules: dict[str, dict[str, Any]], task: str
) -> None:
    for case, (routed, computed, padding) in ranks(1).run(conserved, rules, task)[0].items():
        assert routed > 0 and routed == computed, case
        assert padding == 0, case

"""What blocks decide: the plain definition's choice, whatever the layout, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import own_shard, start
from tests.model.rules import RULES, config_of, decide, packed, scoring_block
from tests.routing.plain import route
from tests.tiny import tiny_config
from uoe_parallel.experts.documents import Documents

LENGTH, BATCH, EXPERTS = 16, 3, 4
DOCUMENTS: dict[str, Tensor | None] = {
    "one each": None,
    "packed": packed(LENGTH, [[5, 7, 4], [16], [1, 1, 2, 9]]),
}
Decided = tuple[Tensor, Tensor, int, Tensor]
Case = tuple[bool, dict[str, Any], str]
CASES: list[Case] = [(causal, rule, docs) for _, causal, rule in RULES for docs in DOCUMENTS]
NAMES = [
    f"{name}, {'causal' if causal else 'bidirectional'}, {docs}"
    for name, causal, _ in RULES
    for docs in DOCUMENTS
]


def inputs(width: int) -> Tensor:
    """[S, B, width] with ties."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(LENGTH, BATCH, width, generator=generator, dtype=torch.float64)
    return (scores * 4).round() / 4


def decide_all(parallel: dict[str, Any]) -> list[Decided]:
    """Of each case: mask and gates of this rank's tokens, dropped pairs, and what a function of
    the gates of chosen pairs has for a gradient."""
    groups = start(tiny_config(parallel=parallel))
    found = []
    for causal, rule, docs in CASES:
        config = config_of(rule)
        block = scoring_block(config, groups, num_experts=EXPERTS, context=LENGTH, causal=causal)
        width = block.router.num_routed * len(block.router.levels)
        x = own_shard(inputs(width), groups).clone().requires_grad_()
        ids = DOCUMENTS[docs]
        documents = (
            Documents.whole(LENGTH, BATCH, x.device) if ids is None else Documents.from_ids(ids)
        )
        mask, gates, dropped = decide(block, x, documents)
        weights = own_shard(torch.arange(LENGTH * BATCH * EXPERTS).view(LENGTH, BATCH, -1), groups)
        (gates * mask * weights).sum().backward()
        assert x.grad is not None
        found.append((mask, gates.detach(), dropped, x.grad))
    return found


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> list[Decided]:
    return ranks(1).run(decide_all, {})[0]


def expected(causal: bool, rule: dict[str, Any], docs: str) -> tuple[Tensor, Tensor, int]:
    """By the plain definition, each document by itself."""
    config = config_of(rule)
    shared = config.shared_experts
    routed = [e for e in range(EXPERTS) if e not in {i * EXPERTS // shared for i in range(shared)}]
    n = len(routed)
    levels = (config.segment_experts is not None) + (config.selection is not None)
    x = inputs(n * levels)
    learned = torch.linspace(-0.5, 0.5, n, dtype=torch.float64).tolist()
    ids = DOCUMENTS[docs]
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64) if ids is None else ids
    masks = torch.zeros(LENGTH, BATCH, EXPERTS, dtype=torch.bool)
    gates = torch.ones(LENGTH, BATCH, EXPERTS, dtype=torch.float64)
    dropped = 0
    for b in range(BATCH):
        for document in ids[b].unique().tolist():
            if document < 0:
                continue
            where = (ids[b] == document).nonzero().flatten()
            rows = x[where, b]
            mask, gate, lost = route(
                None if config.selection is None else rows[:, -n:].tolist(),
                None if config.segment_experts is None else rows[:, :n].tolist(),
                config,
                causal=causal,
                context=LENGTH,
                thresholds=learned,
                bias=learned if "bias" in (config.balance or []) else None,
            )
            block = torch.ones(len(where), EXPERTS, dtype=torch.bool)
            block[:, routed] = torch.tensor(mask)
            masks[where, b] = block
            own = torch.ones(len(where), EXPERTS, dtype=torch.float64)
            own[:, routed] = torch.tensor(gate, dtype=torch.float64)
            gates[where, b] = own
            dropped += lost
    return masks, gates, dropped


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_decisions_are_those_of_the_plain_definition(one_rank: list[Decided], number: int) -> None:
    mask, gates, dropped, _ = one_rank[number]
    masks, wanted, lost = expected(*CASES[number])
    assert torch.equal(mask, masks)
    torch.testing.assert_close(gates[mask], wanted[masks], rtol=1e-13, atol=1e-13)
    assert dropped == lost


def test_the_cases_drop_and_leave_tokens_alone(one_rank: list[Decided]) -> None:
    assert sum(dropped > 0 for _, _, dropped, _ in one_rank) > 5
    assert any((~mask.any(-1)).any() for mask, *_ in one_rank[::2]), "thresholds may take none"


@pytest.mark.parametrize(("tensor", "sharded"), [(2, True), (4, True), (2, False)])
def test_layouts_decide_alike(
    ranks: Ranks, one_rank: list[Decided], tensor: int, sharded: bool
) -> None:
    found = ranks(tensor).run(decide_all, {"tensor": tensor, "sequence_parallel": sharded})
    for name, alone, parts in zip(NAMES, one_rank, zip(*found, strict=True), strict=True):
        if not sharded:
            parts = parts[:1]
        masks, gates, dropped, gradients = zip(*parts, strict=True)
        assert torch.equal(torch.cat(masks), alone[0]), name
        torch.testing.assert_close(torch.cat(gates), alone[1], rtol=1e-13, atol=1e-13)
        assert sum(dropped) == alone[2], name
        torch.testing.assert_close(torch.cat(gradients), alone[3], rtol=1e-12, atol=1e-10)

"""A model learns under every routing rule, on the same data, to below the same loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, start
from tests.model.rules import BIDIRECTIONAL_RULES, CAUSAL_RULES
from tests.tiny import tiny_config
from uoe_parallel.training.routing_state import move_rules

STEPS = 35
BELOW = {True: 0.7, False: 2.8}
"""Nats a token that a causal and a bidirectional model must reach. A uniform guess has 5.5, one
that knows which ids occur 3.2. What is masked takes longer to find out than what comes next."""
IDS = 24
MASK = 256


def batch(step: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and which labels count, [4, 16] each: rows that count on by threes."""
    starts = torch.randint(0, IDS, (4, 1), generator=torch.Generator().manual_seed(step))
    text = (starts + 3 * torch.arange(17)) % IDS
    if causal:
        return text[:, :-1], text[:, 1:], torch.ones(4, 16, dtype=torch.bool)
    hidden = torch.arange(16).expand(4, 16) % 4 == step % 4
    return text[:, :-1].masked_fill(hidden, MASK), text[:, :-1], hidden


def losses_of(rules: dict[str, dict[str, Any]], causal: bool) -> dict[str, tuple[float, float]]:
    """By rule: the first loss and the last one."""
    groups = start(tiny_config())
    found = {}
    for name, rule in rules.items():
        config = tiny_config(
            model={"task": "next_token" if causal else "masked_token", "router_init_std": 0.1},
            feed_forward=rule,
            attention=rule,
        )
        model = build_model(config, groups)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(STEPS):
            tokens, labels, counts = batch(step, causal)
            loss = model(tokens, labels)[counts].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            move_rules(model.routed_blocks(), groups, torch.device("cpu"))
            losses.append(float(loss.detach()))
        found[name] = losses[0], sum(losses[-5:]) / 5
    return found


FEW = ("top-k", "threshold", "segments, then thresholds", "expert choice")
"""One rule of each selection."""
SETS = {"causal": (CAUSAL_RULES, True), "bidirectional": (BIDIRECTIONAL_RULES, False)}


@pytest.mark.parametrize("kind", SETS)
def test_rules_of_each_selection_learn(ranks: Ranks, kind: str) -> None:
    rules, causal = SETS[kind]
    few = {name: rule for name, rule in rules.items() if name in FEW}
    assert few
    learn(ranks, few, causal)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETS)
def test_every_rule_learns(ranks: Ranks, kind: str) -> None:
    learn(ranks, *SETS[kind])


def learn(ranks: Ranks, rules: dict[str, dict[str, Any]], causal: bool) -> None:
    for rule, (first, last) in ranks(1).run(losses_of, rules, causal)[0].items():
        assert first > 5, rule
        assert last < BELOW[causal], (rule, last)

"""Decoding a token at a time gives the logits of the full forward pass, under every causal rule
and mode of attention, on one rank and on several."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, random_tokens, start
from tests.model.rules import CAUSAL_RULES
from tests.tiny import GPT_2, tiny_config
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.language_model import LanguageModel

MODES: dict[str, dict[str, Any]] = {
    "selected": {},
    "all keys": {"keys_and_values": "all"},
    "dense": {"routed_layers": [0]},
}
LENGTHS = [6, 1, 4, 9]
"""Of the beginnings, in one batch."""
Compared = dict[tuple[str, str], list[tuple[Tensor, Tensor]]]
FEW = ("patches with capacity", "segments, then thresholds")
"""Rules for several ranks and for dense attention: decoding has one form for all of them."""


def compare(parts: dict[str, Any], parallel: dict[str, Any], rules: Collection[str]) -> Compared:
    """By rule and mode: logits of tokens that are added one by one, and those of a full pass, of
    the same beginnings and of beginnings of different length."""
    groups = start(tiny_config(parallel=parallel))
    found: Compared = {}
    for rule in rules:
        fields = CAUSAL_RULES[rule]
        # Where attention is dense, the rule is the feed-forward's alone.
        modes = MODES if rule in FEW else {m: MODES[m] for m in MODES if m != "dense"}
        for mode, attention in modes.items():
            config = tiny_config(
                model=parts,
                feed_forward=fields,
                attention=fields | attention,
                parallel=parallel,
            )
            model = build_model(config, groups, torch.float64).eval()
            tokens = random_tokens(config)
            with model.replicated_tokens():
                full = model(tokens)
                assert isinstance(full, Tensor)
                found[rule, mode] = [equal_beginnings(model, tokens, full, first=5)]
                found[rule, mode].append(equal_beginnings(model, tokens, full, first=1))
                found[rule, mode].append(unequal_beginnings(model, tokens, full))
    return found


def equal_beginnings(
    model: LanguageModel, tokens: Tensor, full: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    memory = DecodingMemory()
    parts = [model(tokens[:, :first], memory=memory)]
    parts += [model(token, memory=memory) for token in tokens[:, first:].split(1, dim=1)]
    return torch.cat(parts, dim=1), full


def unequal_beginnings(model: LanguageModel, tokens: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(LENGTHS)
    rows = torch.arange(len(lengths))
    padding = torch.arange(max(LENGTHS)) >= lengths.unsqueeze(1)
    memory = DecodingMemory()
    first = model(
        tokens[:, : max(LENGTHS)].masked_fill(padding, 0), None, -padding.long(), memory=memory
    )
    parts, wanted = [first[rows, lengths - 1]], [full[rows, lengths - 1]]
    for step in range(tokens.shape[1] - max(LENGTHS)):
        place = lengths + step
        parts.append(model(tokens[rows, place].unsqueeze(1), memory=memory)[:, 0])
        wanted.append(full[rows, place])
    return torch.stack(parts), torch.stack(wanted)


@pytest.mark.parametrize(
    ("parts", "parallel"),
    [({}, {}), (GPT_2, {}), ({}, {"tensor": 2}), (GPT_2, {"tensor": 2}), ({}, {"expert": 2})],
    ids=["one", "GPT-2's parts", "tensor", "GPT-2's parts, tensor", "wide experts"],
)
def test_tokens_one_by_one_are_those_of_the_full_pass(
    ranks: Ranks, parts: dict[str, Any], parallel: dict[str, Any]
) -> None:
    world = max(parallel.get("tensor", 1), parallel.get("expert", 1))
    rules = FEW if parts or world > 1 else CAUSAL_RULES
    for found in ranks(world).run(compare, parts, parallel, list(rules)):
        for case, pairs in found.items():
            for number, (decoded, full) in enumerate(pairs):
                worst = (decoded - full).abs().max()
                assert worst < 1e-11, (*case, number)

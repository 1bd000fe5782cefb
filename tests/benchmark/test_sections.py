"""Sections of the layer benchmark, at sizes at which no time means anything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.benchmark.sessions import SIZES, session
from tests.harness import Ranks
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.benchmark import attention, memory, skew, traffic

Entries = list[dict[str, Any]]

ELEMENT = 4


def _attention() -> Entries:
    return attention.measure(session(), lengths=(8, 64))


def test_attention_is_held_against_dense_attention(ranks: Ranks) -> None:
    (entries,) = ranks(1).run(_attention)
    assert json.loads(json.dumps(entries)) == entries
    names = [(entry["length"], entry["contender"]) for entry in entries]
    assert names == [(n, c) for n in (8, 64) for c in (attention.SMHA, attention.DENSE)]
    for smha, dense in (entries[:2], entries[2:]):
        assert len(smha["seconds"]) == len(dense["seconds"]) == len(smha["model_seconds"]) == 2
        assert smha["peak_bytes"] > 0 and dense["peak_bytes"] > 0
        # Top-k is exact: half of the heads for every token, though not half of the tokens for
        # every head.
        assert smha["mean_share"] == pytest.approx(0.5)
        assert smha["mean_square_share"] >= 0.25 - 1e-12
        spread = smha["ratio_to_model"]
        assert spread["smallest"] <= spread["median"] <= spread["largest"]
        smallest = min(s / m for s, m in zip(smha["seconds"], smha["model_seconds"], strict=True))
        assert spread["smallest"] == pytest.approx(smallest)


def test_forced_masks_have_as_many_rows_each() -> None:
    shape = (SIZES.sequence, SIZES.batch)
    even = skew.even_mask(SIZES)
    assert torch.equal(even.sum(-1), torch.full(shape, SIZES.top_k))
    rows = SIZES.tokens * SIZES.top_k
    assert even.sum((0, 1)).tolist() == [rows // SIZES.experts] * SIZES.experts
    for seed in range(skew.SKEWS):
        mask = skew.skewed_mask(SIZES, seed)
        assert torch.equal(mask.sum(-1), torch.full(shape, SIZES.top_k))
        assert torch.equal(mask, skew.skewed_mask(SIZES, seed))
        # At least: a law may leave more of them without a token.
        assert (mask.sum((0, 1)) == 0).sum() >= SIZES.experts // 4
    few = replace(SIZES, experts=3)
    assert torch.equal(skew.skewed_mask(few, 0).sum(-1), torch.full(shape, SIZES.top_k))


def _skew() -> tuple[Entries, list[float]]:
    """Also what the block did in its last pass."""
    tiny = session()
    seen: list[float] = []
    forced = skew.forced

    def watched(mask: torch.Tensor) -> Any:
        seen.append(float(mask.sum()))
        return forced(mask)

    skew.forced = watched
    try:
        return skew.measure(tiny), seen
    finally:
        skew.forced = forced


def test_skews_are_held_against_even_routing(ranks: Ranks) -> None:
    ((entries, seen),) = ranks(1).run(_skew)
    assert json.loads(json.dumps(entries)) == entries
    assert [entry["routing"] for entry in entries] == ["even", *(f"skew {i}" for i in range(10))]
    assert {entry["rows"] for entry in entries} == set(seen) == {64}
    even, *skews = entries
    assert even["largest_share"] == 1 / 8 and even["empty_experts"] == 0
    assert all(entry["largest_share"] > 1 / 8 and entry["empty_experts"] > 0 for entry in skews)
    assert all(len(entry["seconds"]) == 2 for entry in entries)
    assert even["ratio_to_even"] == {"median": 1.0, "smallest": 1.0, "largest": 1.0}


def _memory() -> Entries:
    return memory.measure(session())


def test_memory_is_told_apart(ranks: Ranks) -> None:
    (entries,) = ranks(1).run(_memory)
    assert json.loads(json.dumps(entries)) == entries
    by_layer = {entry["layer"]: entry for entry in entries}
    hidden_states = SIZES.tokens * SIZES.hidden * ELEMENT
    for entry in entries:
        assert entry["output_bytes"] == entry["input_gradient_bytes"] == hidden_states
        assert entry["peak_bytes"] >= entry["forward_peak_bytes"] > entry["saved_bytes"] > 0
    # A dense block keeps its hidden layer before and after the activation.
    dense = by_layer["dense feed-forward"]
    assert dense["saved_bytes"] == 2 * SIZES.tokens * SIZES.ffn * ELEMENT
    weights = 2 * SIZES.ffn * SIZES.hidden * ELEMENT
    assert dense["parameter_gradient_bytes"] == weights
    router = SIZES.experts * SIZES.hidden * ELEMENT
    assert by_layer["routed feed-forward"]["parameter_gradient_bytes"] == weights + router


def _traffic() -> tuple[Entries, list[ExchangeSizes]]:
    """With the sizes of the exchanges as this rank sees them."""
    tiny = session()
    rank, size = tiny.groups.tensor_rank, tiny.groups.tensor.size()
    exchanges = []
    for mask in (skew.even_mask(SIZES), skew.skewed_mask(SIZES, 0)):
        shards = mask.chunk(size)
        exchanges.append(ExchangeSizes.of_masks(lambda p, s=shards: s[p], rank, size))
    return traffic.measure(tiny), exchanges


@pytest.mark.parametrize("world_size", [2, 4])
def test_traffic_is_equal_to_the_byte(ranks: Ranks, world_size: int) -> None:
    results = ranks(world_size).run(_traffic)
    entries = results[0][0]
    assert json.loads(json.dumps(entries)) == entries
    assert [entry["routing"] for entry in entries] == ["even", "skewed"]
    row, others = SIZES.hidden * ELEMENT, world_size - 1
    for number, entry in enumerate(entries):
        assert entry["equal"] and entry["measured_bytes"] == entry["expected_bytes"]
        plans = [exchanges[number] for _, exchanges in results]
        rows = sum(sum(p.send_rows) - p.send_rows[rank] for rank, p in enumerate(plans))
        pairs = sum(sum(p.send_pairs) - p.send_pairs[rank] for rank, p in enumerate(plans))
        forward, backward = (entry["measured_bytes"][phase] for phase in traffic.PHASES)
        assert forward["rows"] == backward["rows"] == 2 * rows * row
        assert forward["counts"] == world_size * others * 2 * 8 and backward["counts"] == 0
        assert forward["gates and ids"] == 8 * pairs and backward["gates and ids"] == 4 * pairs
        assert entry["row_per_expert_bytes"]["forward"] == 2 * pairs * row >= forward["rows"]
        assert entry["all_gather_bytes"]["forward"] == 2 * others * SIZES.tokens * row
        assert entry["distinct_remote_ranks"] == rows / SIZES.tokens


def _wrong_traffic() -> Entries:
    """Of a formula that expects a rank to send its gates twice as wide."""
    right = traffic.exchange_traffic
    traffic.exchange_traffic = lambda sizes, group, rank, row, gate: right(
        sizes, group, rank, row, 2 * gate
    )
    try:
        return traffic.measure(session())
    finally:
        traffic.exchange_traffic = right


def test_a_wrong_formula_shows(ranks: Ranks) -> None:
    for entry in ranks(2).run(_wrong_traffic)[0]:
        assert not entry["equal"]

"""Contenders compute what is claimed of them, and what does not is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.benchmark import layers
from tests.benchmark.layers import TINY
from tests.harness import Ranks

EXACT = ["this project", "dense, same active width", "dense, full width", "megatron-core MoE"]
PRODUCTS = 3 * 2 * TINY.hidden * TINY.expert_ffn
"""Multiply-adds of one row, forward and backward."""
ROUTER = 3 * TINY.tokens * TINY.hidden * TINY.experts


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_work(ranks: Ranks, world_size: int, top_k: int) -> None:
    sizes = replace(TINY, top_k=top_k)
    first, *others = ranks(world_size).run(layers.work_of_everybody, sizes)
    assert all(other == first for other in others)
    pairs = TINY.tokens * top_k
    for name in EXACT:
        work = first[name]
        wanted = TINY.tokens * TINY.experts if name == "dense, full width" else pairs
        assert (work.pairs, work.rows) == (wanted, wanted), name
    assert first["dense, same active width"].multiply_adds == pairs * PRODUCTS
    assert first["dense, full width"].multiply_adds == TINY.tokens * TINY.experts * PRODUCTS
    assert first["megatron-core MoE"].multiply_adds == pairs * PRODUCTS + ROUTER

    dropless = first["DeepSpeed MoE, dropless"]
    assert dropless.pairs == pairs
    assert dropless.rows > pairs and dropless.rows % (TINY.experts * world_size) == 0
    assert dropless.multiply_adds >= dropless.rows * PRODUCTS + ROUTER
    capacity = first["DeepSpeed MoE, capacity 1.0"]
    assert capacity.pairs < capacity.rows == pairs


def test_all_compute_the_plain_reference(ranks: Ranks) -> None:
    [outcomes] = ranks(1).run(layers.against_the_reference, TINY)
    assert len(outcomes) == 6
    for name, (y, expected) in outcomes.items():
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_all_visit_the_same_experts(ranks: Ranks) -> None:
    for gates in ranks(2).run(layers.gates_of_everybody):
        ours = gates["this project"] != 0
        assert ours.any(dim=0).all()
        for name in ("megatron-core MoE", "DeepSpeed MoE, dropless"):
            assert torch.equal(gates[name] != 0, ours), name
        kept = gates["DeepSpeed MoE, capacity 1.0"] != 0
        assert (kept <= ours).all() and kept.sum() < ours.sum()


def test_nothing_stays_replaced(ranks: Ranks) -> None:
    assert ranks(2).run(layers.stand_ins_left) == [[], []]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("pair", "this project (n 4, k 2) computes 126 (token, expert) pairs instead of 128"),
        ("width", "wide (n 4, k 2) computes another function of its weights and gates"),
        ("width", f"takes {256 * PRODUCTS} multiply-adds instead of {128 * PRODUCTS}"),
        ("twice", f"multiply-adds instead of {128 * PRODUCTS + ROUTER}"),
        ("shape", "gives an output of another shape than its input"),
        ("upstream", "leaves the input without a finite gradient"),
        ("router", "does not visit the experts of the highest scores"),
        ("weight", "megatron-core MoE (n 4, k 2) computes another function of its weights"),
        ("frozen", "leaves router.weight without a finite gradient"),
    ],
)
def test_incomparable_work_is_refused(ranks: Ranks, wrong: str, told: str) -> None:
    [verdict] = ranks(1).run(layers.verdict, wrong)
    assert told in verdict


def test_nothing_is_refused_without_reason(ranks: Ranks) -> None:
    assert ranks(1).run(layers.verdict, "nothing") == [""]


def test_ranks_agree_on_what_one_of_them_sees(ranks: Ranks) -> None:
    first, second = ranks(2).run(layers.verdict, "upstream")
    assert first == second and "leaves the input without a finite gradient" in first


def test_a_layer_that_fails_anywhere_is_not_measured(ranks: Ranks) -> None:
    assert ranks(2).run(layers.foreign_that_fails_on_last_rank) == [
        "it failed on another rank",
        "no-such-library (not installed): RuntimeError: no such kernel",
    ]


def test_wide_and_narrow(ranks: Ranks) -> None:
    (wide, narrow), _ = ranks(2).run(layers.wide_and_narrow)
    names = ["this project", "dense, same active width"]
    assert [(e["contender"], e["ffn"], e["pairs"]) for e in wide] == [
        (name, 128, 128) for name in names
    ]
    assert wide[1]["ours_over_this"]["median"] == wide[0]["this_over_dense"]["median"]

    *timed, flatness = narrow
    assert flatness["compared"] == "this project: n 64, k 8 over n 8, k 1"
    slices = [(8, 1), (16, 2), (32, 4), (64, 8)]
    for name in ("this project", "megatron-core MoE", "DeepSpeed MoE, dropless"):
        own = [e for e in timed if e["contender"] == name]
        assert [(e["experts"], e["top_k"]) for e in own] == slices
        assert {e["ffn"] for e in own} == {32}
        assert all(len(e["seconds"]) == 2 and e["this_over_dense"] for e in own)
    first, last = timed[0]["seconds"], timed[3]["seconds"]
    ratios = sorted(b / a for a, b in zip(first, last, strict=True))
    assert flatness["ratio"]["smallest"] == ratios[0]
    assert flatness["ratio"]["largest"] == ratios[-1]

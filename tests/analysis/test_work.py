"""What a routed block gives a rank to do: as counted, as drawn, and at most."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
import torch

from tests.analysis.work_cases import work_of_a_pass, work_without_a_run
from tests.harness import Ranks
from tests.tiny import tiny_config
from uoe_parallel.analysis.exchange import ExchangeSizes, sample_exchange
from uoe_parallel.analysis.work import BlockWork
from uoe_parallel.config.schema import RunConfig

WIDE: dict[str, Any] = {"tensor": 2, "expert": 4}
LENGTH, BATCH, EXPERTS, TOP_K, RANKS = 2048, 2, 8, 3, 4
TOKENS = LENGTH * BATCH // 2
"""Of one rank."""
FEED_FORWARD = "layers.0.feed_forward"


def _large(**feed_forward: Any) -> RunConfig:
    return tiny_config(
        model={"sequence_length": LENGTH},
        feed_forward={"num_experts": EXPERTS, "top_k": TOP_K} | feed_forward,
        parallel=WIDE,
    )


def test_work_of_a_run_is_what_its_exchanges_bring(ranks: Ranks) -> None:
    config = tiny_config(parallel=WIDE, attention={"spread": "expert"})
    by_rank = ranks(4).run(work_of_a_pass, config)
    assert [len(works) for works in by_rank] == [4] * 4
    for block in zip(*by_rank, strict=True):
        for work, sizes in block:
            assert sizes is not None
            assert work.sent_rows == sum(sizes.send_rows)
            assert work.sent_pairs == sum(sizes.send_pairs)
            assert work.rows == sum(sizes.receive_rows)
            assert work.pairs == sum(sizes.receive_pairs)
        assert sum(work.sent_pairs for work, _ in block) == sum(work.pairs for work, _ in block)


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence_parallel": False}, {"tensor": 2}])
def test_rows_that_do_not_travel(ranks: Ranks, parallel: dict[str, Any]) -> None:
    config = tiny_config(
        parallel=parallel, feed_forward={"routed_layers": []}, attention={"keys_and_values": "all"}
    )
    tokens = config.training.micro_batch_size * config.model.sequence_length
    first, second = ranks(2).run(work_of_a_pass, config)
    for (work, sizes), (other, _) in zip(first, second, strict=True):
        assert sizes is None
        assert (work.sent_rows, work.sent_pairs, work.rows) == (0, 0, tokens)
        assert work.pairs + other.pairs == tokens * config.attention.top_k
    (works,) = ranks(1).run(work_without_a_run, config, 2)
    for expected, _ in works:
        assert expected["layers.0.attention"] == BlockWork(0, 0, tokens, (8,) * 4)


def _sampled(rank: int, seed: int, shared: set[int]) -> ExchangeSizes:
    return sample_exchange(
        tokens=TOKENS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        shared=shared,
        rank=rank,
        num_ranks=RANKS,
        seed=seed,
    )


@pytest.mark.parametrize("shared", [set(), {0}, {0, 4}], ids=len)
def test_expected_work_is_the_mean_of_what_is_drawn(ranks: Ranks, shared: set[int]) -> None:
    (works,) = ranks(1).run(work_without_a_run, _large(shared_experts=len(shared)), RANKS)
    for rank, (expected, _) in enumerate(works):
        work, sizes = expected[FEED_FORWARD], _sampled(rank, 1, shared)
        assert work.sent_rows == pytest.approx(sum(sizes.send_rows), rel=0.03)
        assert work.sent_pairs == sum(sizes.send_pairs)
        assert work.rows == pytest.approx(sum(sizes.receive_rows), rel=0.03)
        assert work.pairs == pytest.approx(sum(sizes.receive_pairs), rel=0.03)
        assert len(work.run_lengths) == EXPERTS // RANKS * 2 * BATCH
        of_experts = torch.tensor(work.run_lengths).view(EXPERTS // RANKS, -1)
        for local, lengths in enumerate(of_experts.tolist()):
            is_shared = local + rank * EXPERTS // RANKS in shared
            routed = round(LENGTH * TOP_K / (EXPERTS - len(shared)))
            assert set(lengths) == {LENGTH if is_shared else routed}


def test_expected_work_of_all_ranks_adds_up(ranks: Ranks) -> None:
    (works,) = ranks(1).run(work_without_a_run, _large(), RANKS)
    blocks = [expected[FEED_FORWARD] for expected, _ in works]
    assert sum(work.pairs for work in blocks) == RANKS * TOKENS * TOP_K
    assert sum(work.sent_pairs for work in blocks) == RANKS * TOKENS * TOP_K
    here = EXPERTS // RANKS
    visits = 1 - comb(EXPERTS - here, TOP_K) / comb(EXPERTS, TOP_K)
    assert {work.rows for work in blocks} == {round(2 * BATCH * LENGTH * visits)}
    assert {work.sent_rows for work in blocks} == {round(RANKS * TOKENS * visits)}


def _as_work(sizes: ExchangeSizes) -> tuple[int, int, int, int]:
    """Sent rows and pairs, and received ones."""
    sent, received = sum(sizes.send_rows), sum(sizes.receive_rows)
    return sent, sum(sizes.send_pairs), received, sum(sizes.receive_pairs)


def _of_same_choices(experts: set[int], shared: set[int], rank: int) -> ExchangeSizes:
    mask_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    mask_TE[:, list(experts | shared)] = True
    return ExchangeSizes.of_masks(lambda _: mask_TE, rank, RANKS)


@pytest.mark.parametrize("shared", [set(), {0}, {0, 4}], ids=len)
def test_nothing_is_worse_than_the_worst(ranks: Ranks, shared: set[int]) -> None:
    (works,) = ranks(1).run(work_without_a_run, _large(shared_experts=len(shared)), RANKS)
    for rank, (_, worst) in enumerate(works):
        work = worst[FEED_FORWARD]
        bound = (work.sent_rows, work.sent_pairs, work.rows, work.pairs)
        own = set(range(2 * rank, 2 * rank + 2)) - shared
        others = sorted(set(range(EXPERTS)) - own - shared)
        full = _of_same_choices(own | set(others[: TOP_K - len(own)]), shared, rank)
        # One expert of each rank, first of those without a shared one.
        spread = sorted(set(range(1, EXPERTS, 2)), key=lambda e: e - 1 in shared)[:TOP_K]
        wide = _of_same_choices(set(spread), shared, rank)
        assert _as_work(full)[1:] == bound[1:]
        assert _as_work(wide)[:2] == bound[:2]
        assert sorted(work.run_lengths)[-1] == LENGTH
        for seed in range(3):
            drawn = _as_work(_sampled(rank, seed, shared))
            assert all(n <= most for n, most in zip(drawn, bound, strict=True))


@pytest.mark.parametrize(
    "rules",
    [
        {"selection": "threshold", "threshold_warmup": 9},
        {"selection": None, "segment_length": 4, "segment_experts": 2},
        {"selection": None, "segment_length": 12, "segment_experts": 2, "shared_experts": 1},
    ],
)
def test_rules_that_let_tokens_visit_more(ranks: Ranks, rules: dict[str, Any]) -> None:
    config = tiny_config(parallel={"tensor": 2}, feed_forward=rules, attention=rules)
    real = ranks(2).run(work_of_a_pass, config)
    (works,) = ranks(1).run(work_without_a_run, config, 2)
    for blocks, (_, worst) in zip(real, works, strict=True):
        for (work, _), most in zip(blocks, worst.values(), strict=True):
            assert work.sent_rows <= most.sent_rows
            assert work.sent_pairs <= most.sent_pairs
            assert work.rows <= most.rows
            assert work.pairs <= most.pairs
            if rules["selection"] == "threshold":
                assert work == most

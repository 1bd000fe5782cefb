"""What is reported of the routed blocks, under every way to share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, own_shard, start
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.context import micro_batch_context
from uoe_parallel.routing.balance import BalanceRule
from uoe_parallel.routing.running import Running
from uoe_parallel.routing.statistics import GATE_BINS, GATE_EDGES
from uoe_parallel.training.metrics import Bars, Value
from uoe_parallel.training.routing_report import RoutingReporter

FIRST = "layers.0.feed_forward"
LAST = "layers.1.attention"
EXPERTS = {"feed_forward": 8, "attention": 4}
TOP_K = {"feed_forward": 3, "attention": 2}
BLOCKS = [f"layers.{layer}.{kind}" for layer in (0, 1) for kind in EXPERTS]


class Learned(BalanceRule, Running):
    """A rule that has a state to show, and nothing else."""

    def __init__(self, name: str, value_E: list[float]) -> None:
        self.name = name
        self.value_E = torch.tensor(value_E, dtype=torch.float64)

    def observe(self, scores_SBE: Tensor, mask_SBE: Tensor, counted_SB: Tensor) -> None: ...

    def move(self, observed: Tensor) -> None: ...

    def shown(self) -> dict[str, Tensor]:
        return {self.name: self.value_E}


def two_reports(config: RunConfig) -> tuple[dict[str, Value], dict[str, Value]]:
    """After one training pass over this data rank's sequences, and right after that report."""
    groups = start(config)
    model = build_model(config, groups)
    blocks = model.routed_blocks()
    moving = Learned("threshold", [-1.0, 0.0, 1.0, 2.0])
    rules = {FIRST: [Learned("threshold", [0.5] * 8)], LAST: [moving, Learned("bias", [1.0] * 4)]}
    for name in rules.keys() & blocks.keys():
        blocks[name].router.levels["router_weight"].balance += rules[name]
    reporter = RoutingReporter(blocks, config, groups, torch.device("cpu"))
    moving.value_E += torch.tensor([0.1, -0.3, 0.0, 0.0])
    # All blocks get the same hidden states, so that stages need not talk.
    length, hidden_size = config.model.sequence_length, config.model.hidden_size
    shape = (length, config.training.global_batch_size, hidden_size)
    hidden_SBD = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    mine_SBD = hidden_SBD.chunk(groups.layout.data, dim=1)[groups.data_rank]
    context = micro_batch_context((mine_SBD.shape[1], length), None, groups, torch.device("cpu"))
    for block in blocks.values():
        block(own_shard(mine_SBD, groups), context)
    return reporter.report(), reporter.report()


def numbers(value: Value) -> Sequence[float]:
    if isinstance(value, Bars):
        return value.heights
    assert not isinstance(value, str)
    return value if isinstance(value, Sequence) else [value]


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> tuple[dict[str, Value], dict[str, Value]]:
    return ranks(1).run(two_reports, tiny_config())[0]


def test_each_block_has_every_value(alone: tuple[dict[str, Any], dict[str, Any]]) -> None:
    report, _ = alone
    for block in BLOCKS:
        kind = block.rpartition(".")[2]
        load, gates = report[f"load/{block}"], report[f"gate_histogram/{block}"]
        assert len(load.heights) == EXPERTS[kind] and sum(load.heights) == pytest.approx(
            1, abs=1e-4
        )
        assert load.edges is None
        expected = max(load.heights) * EXPERTS[kind]
        assert report[f"load_max_over_mean/{block}"] == pytest.approx(expected, abs=1e-5)
        assert 0 < report[f"load_entropy/{block}"] < 1
        assert report[f"experts_per_token/{block}"] == TOP_K[kind]
        assert report[f"dropped_share/{block}"] == report[f"unrouted_share/{block}"] == 0
        assert f"dropped/{block}" not in report
        assert report[f"balance_loss/{block}"] > 0.5 and report[f"z_loss/{block}"] > 0
        assert len(gates.heights) == GATE_BINS and gates.edges == GATE_EDGES
        assert sum(gates.heights) == pytest.approx(1, abs=1e-4)
        assert sum(gates.heights[20:]) == 0, "twice a sigmoid is at most 2"
        partners = report[f"partner/{block}"]
        assert all(partner in range(EXPERTS[kind]) for partner in partners)
        assert all(partner != expert for expert, partner in enumerate(partners))
        assert all(0 < share <= 1 for share in report[f"partner_share/{block}"].heights)


def test_percentiles_are_over_blocks(alone: tuple[dict[str, Any], dict[str, Any]]) -> None:
    report, _ = alone
    for value in ("load_max_over_mean", "load_entropy"):
        values = sorted(report[f"{value}/{block}"] for block in BLOCKS)
        assert report[f"{value}/min"] == values[0] and report[f"{value}/max"] == values[-1]
        assert report[f"{value}/p50"] == pytest.approx((values[1] + values[2]) / 2)
        assert values[0] < report[f"{value}/p10"] < values[1]
        assert values[2] < report[f"{value}/p90"] < values[3]
    assert report["load_max_over_mean"] == report["load_max_over_mean/max"]


def test_running_state_and_its_drift_are_shown(
    alone: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    first, second = alone
    assert first[f"threshold/{FIRST}"] == [0.5] * 8
    assert first[f"threshold_drift/{FIRST}"] == 0
    assert first[f"threshold/{LAST}"] == [-0.9, -0.3, 1, 2]
    assert first[f"threshold_drift/{LAST}"] == pytest.approx(0.1)
    assert first[f"bias/{LAST}"] == [1.0] * 4
    assert second[f"threshold/{LAST}"] == first[f"threshold/{LAST}"]
    assert second[f"threshold_drift/{LAST}"] == 0, "since the last report"
    assert f"bias/{FIRST}" not in first and "threshold/layers.1.feed_forward" not in first


def test_what_was_reported_is_forgotten(alone: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, second = alone
    for block in BLOCKS:
        assert set(second[f"load/{block}"].heights) == {0.0}
        assert second[f"unrouted_share/{block}"] == second[f"experts_per_token/{block}"] == 0
        assert second[f"load_max_over_mean/{block}"] == 1
        assert all(map(math.isnan, second[f"partner/{block}"]))


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        ({"tensor": 2, "sequence_parallel": True}, 2),
        ({"tensor": 2, "sequence_parallel": False}, 2),
        ({"pipeline": 2}, 2),
        ({}, 2),
        ({"tensor": 2, "sequence_parallel": True, "pipeline": 2}, 4),
    ],
)
def test_layouts_report_the_same_on_every_rank(
    ranks: Ranks,
    alone: tuple[dict[str, Value], dict[str, Value]],
    parallel: dict[str, Any],
    world: int,
) -> None:
    for outcome in ranks(world).run(two_reports, tiny_config(parallel=parallel)):
        for report, expected in zip(outcome, alone, strict=True):
            assert report.keys() == expected.keys()
            for name, value in expected.items():
                assert numbers(report[name]) == pytest.approx(
                    numbers(value), rel=1e-5, abs=2e-6, nan_ok=True
                ), name


def hand_made(mask_TE: list[list[int]], dropped_TE: list[list[int]]) -> dict[str, Value]:
    """A report of one block of four experts in which these pairs were taken and dropped."""
    config = tiny_config(attention={"routed_layers": [1]}, feed_forward={"routed_layers": "none"})
    groups = start(config)
    blocks = build_model(config, groups).routed_blocks()
    reporter = RoutingReporter(blocks, config, groups, torch.device("cpu"))
    mask_SBE, dropped_SBE = (torch.tensor(t).bool().unsqueeze(1) for t in (mask_TE, dropped_TE))
    loss = torch.tensor(3.0)
    blocks[LAST].statistics.add(
        mask_SBE, torch.ones(mask_SBE.shape), dropped_SBE, loss, 2 * loss, 2.0, None
    )
    return reporter.report()


def test_values_of_a_block_by_hand(ranks: Ranks) -> None:
    mask = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    dropped = [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    [report] = ranks(1).run(hand_made, mask, dropped)
    of_block = {name.removesuffix(f"/{LAST}"): value for name, value in report.items()}
    assert numbers(of_block["load"]) == [0.5, 0.333333, 0.166667, 0]
    assert of_block["load_max_over_mean"] == 2
    assert of_block["dropped_share"] == 3 / 9
    assert numbers(of_block["dropped"]) == [0, 0, 0.666667, 1]
    assert of_block["unrouted_share"] == 1 / 4
    assert of_block["experts_per_token"] == 6 / 4
    assert (of_block["balance_loss"], of_block["z_loss"]) == (1.5, 3.0)
    assert numbers(of_block["gate_histogram"])[GATE_EDGES.index(1.0)] == 1
    # Every routed token visits expert 0, which tells nothing about the others.
    assert of_block["partner"] == pytest.approx([1, math.nan, math.nan, math.nan], nan_ok=True)
    assert numbers(of_block["partner_share"]) == [0.666667, 0, 0, 0]


def without_blocks() -> dict[str, Value]:
    config = tiny_config(
        attention={"routed_layers": "none"}, feed_forward={"routed_layers": "none"}
    )
    return RoutingReporter({}, config, start(config), torch.device("cpu")).report()


def test_a_dense_model_has_nothing_to_report(ranks: Ranks) -> None:
    assert ranks(1).run(without_blocks) == [{}]

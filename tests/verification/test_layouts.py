"""Layouts are found by name, get a micro-batch that fits, or a reason why they can't run."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.layout import ParallelLayout, supported_layouts
from uoe_parallel.verification.layouts import candidates, reasons, select


def _names(config: RunConfig, ranks: int, *patterns: str) -> list[str]:
    return [candidate.name for candidate in select(candidates(config, ranks), patterns).runs]


def test_all_supported_layouts_of_two_ranks_and_more_run() -> None:
    config = tiny_config()
    expected = [name for world in (2, 3, 4) for name in supported_layouts(config, world)]
    # One sequence each fits four data ranks, which the given two don't.
    found = _names(config, 4)
    assert set(found) - set(expected) == {name for name in found if name.startswith("dp4-")}
    assert set(expected) <= set(found)
    assert {"dp2-zero3", "pp2-dp2-ep2-zero1", "tp2-sp-dp2-ep4-zero2", "tp4-zero0"} <= set(found)
    assert not any(name.startswith("one") for name in found)


def test_names_are_unique_and_those_of_layouts() -> None:
    found = candidates(tiny_config(), 8)
    assert len({candidate.name for candidate in found}) == len(found)
    for candidate in found:
        layout = ParallelLayout.from_config(candidate.config.parallel, candidate.layout.world_size)
        assert str(layout) == candidate.name


@pytest.mark.parametrize(
    ("batch", "micro", "expected"),
    [
        (12, 12, {1: 12, 2: 6, 3: 4, 4: 3}),
        (12, 4, {1: 4, 2: 3, 3: 4, 4: 3}),
        (24, 2, {1: 2, 2: 2, 3: 2, 4: 2}),
    ],
)
def test_micro_batches_fit_the_data_size(batch: int, micro: int, expected: dict[int, int]) -> None:
    config = tiny_config(training={"global_batch_size": batch, "micro_batch_size": micro})
    found = {
        candidate.layout.data: candidate.config.training.micro_batch_size
        for candidate in select(candidates(config, 4), ["one-zero0", "dp?-zero0"]).runs
    }
    assert found == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["tp2-sp-zero1"], ["tp2-sp-zero1"]),
        (["pp2-zero*", "dp2-zero0"], ["dp2-zero0", "pp2-zero0", "pp2-zero1"]),
        (["*-zero3", "dp2-zero3"], ["one-zero3", "dp2-zero3", "tp2-sp-zero3", "tp2-zero3"]),
        (["one-zero[12]"], ["one-zero1", "one-zero2"]),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    assert _names(tiny_config(), 2, *patterns) == expected


def test_what_a_pattern_matches_in_vain_is_left_out() -> None:
    selection = select(candidates(tiny_config(), 2), ["pp2-*"])
    assert [candidate.name for candidate in selection.left_out] == ["pp2-zero2", "pp2-zero3"]
    [(reason, names)] = reasons(selection.left_out).items()
    assert names == ["pp2-zero2", "pp2-zero3"]
    assert reason.startswith("parallel.zero_stage = 2 can't be combined with parallel.pipeline")


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("tp3*", r"tp3\* can't run:\n  - tp3-sp-zero0, .*feed_forward.num_experts = 8 is not a"),
        ("tp2-zero4", r"tp2-zero4 matches no layout.*: one-zero0 .*dp2-zero0 .*tp2-zero3"),
        ("pp2-zero3", r"pp2-zero3 can't run:\n  - pp2-zero3: parallel.zero_stage = 3 can't be"),
    ],
)
def test_patterns_for_nothing_are_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"--layouts: {complaint}"):
        select(candidates(tiny_config(), 3), ["dp2-*", pattern])


def test_no_layout_at_all_is_refused() -> None:
    config = tiny_config(
        training={"global_batch_size": 1, "micro_batch_size": 1},
        model={"num_layers": 1},
        feed_forward={"num_experts": 1, "top_k": 1, "routed_layers": "none"},
    )
    with pytest.raises(UserError, match="no layout of 2 to 2 ranks can run:"):
        select(candidates(config, 2), [])


def test_a_layout_that_deepspeeds_section_contradicts_is_left_out() -> None:
    config = tiny_config(deepspeed={"zero_optimization": {"stage": 1}})
    selection = select(candidates(config, 2), ["dp2-zero*"])
    assert [candidate.name for candidate in selection.runs] == ["dp2-zero1"]
    [reason] = reasons(selection.left_out)
    assert reason.startswith("deepspeed.zero_optimization.stage = 1 contradicts 0")

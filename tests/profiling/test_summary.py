"""What events come to."""

from __future__ import annotations

import numpy as np
import pytest

from tests.profiling.made_up import event, joined, two_steps
from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.bandwidth import bus_bytes, moved
from uoe_parallel.profiling.join import Joined
from uoe_parallel.profiling.summary import (
    Amount,
    Row,
    category_times,
    expected_amounts,
    group_rows,
    summarise,
)


def _of_two_steps() -> list[Row]:
    found, _ = two_steps()
    expected = expected_amounts(
        [Transfer(Purpose.DENSE_BLOCKS, "forward", "tensor", "all_reduce", 1, 1000)]
        for _ in range(2)
    )
    return summarise(found, 2, expected)


def test_rows_are_of_a_rank_in_a_step() -> None:
    dispatch, dense = _of_two_steps()
    assert (dispatch.category, dense.category) == ("dispatch", "reduce")
    assert dense.measured == Amount(2, 2, 2000) and dense.as_expected
    assert dispatch.measured == Amount(2, 2, 4000) and not dispatch.as_expected
    assert dispatch.expected is None
    assert dense.seconds == pytest.approx(0.25) and dense.waiting == pytest.approx(0.15)
    assert (dense.least, dense.most) == pytest.approx((0.1, 0.4))
    assert dense.late_rank == 1 and dense.late_seconds == pytest.approx(0.3)
    assert dense.hidden == 0
    assert dispatch.seconds == pytest.approx(0.3) and dispatch.hidden == pytest.approx(0.2)
    assert dispatch.late_rank is None


def test_bandwidths_are_of_moving_alone() -> None:
    dispatch, dense = _of_two_steps()
    # 1000 bytes in 0.1 s; both ranks of two send and get each half of them.
    assert dense.algorithm_bandwidth == pytest.approx(1e4)
    assert dense.bus_bandwidth == pytest.approx(1e4)
    # 2000 bytes in 0.3 s, of which 1500 leave.
    assert dispatch.algorithm_bandwidth == pytest.approx(2000 / 0.3)
    assert dispatch.bus_bandwidth == pytest.approx(1500 / 0.3)


@pytest.mark.parametrize(
    ("operation", "size", "bus"),
    [
        ("all_reduce", 4, 1500),
        ("all_gather", 4, 3000),
        ("reduce_scatter", 4, 750),
        ("all_to_all", 4, 900),
        ("send", 2, 1000),
        ("broadcast", 4, 1000),
    ],
)
def test_bytes_over_a_link(operation: str, size: int, bus: float) -> None:
    kept = np.array([100 if operation == "all_to_all" else 0])
    assert bus_bytes(operation, np.array([1000]), kept, np.array([size])) == bus


def test_of_a_send_the_slower_end_and_the_senders_bytes_count() -> None:
    common = {"axis": "next_stage", "purpose": "stage outputs"}
    found = joined(
        [event(1.0, 1.1, operation="send", **common)],
        [event(1.0, 1.5, operation="recv", payload=0, **common)],
    )
    assert moved(found).payload.tolist() == [1000]
    assert moved(found).seconds.tolist() == pytest.approx([0.5])
    (row,) = summarise(found, 1, {})
    assert row.measured == Amount(1, 1, 1000) and row.bus_bandwidth == pytest.approx(2000)


def test_the_middle_call_is_typical() -> None:
    payloads = (1000, 7000, 0, 3000)
    found = joined([event(n, n + 0.1, number=n, payload=size) for n, size in enumerate(payloads)])
    (row,) = summarise(found, 1, {})
    assert row.typical_payload == 3000


def test_what_was_expected_and_never_came_is_seen() -> None:
    key = ("gradients", "data", "all_reduce")
    (row,) = summarise(joined([]), 2, {key: Amount(2, 4, 800)})
    assert row.measured is None and row.expected == Amount(2, 4, 800) and not row.as_expected


def test_expected_amounts_are_of_all_ranks_and_phases() -> None:
    own = [
        Transfer(Purpose.STAGE_OUTPUTS, "forward", "next_stage", "send", 2, 20),
        Transfer(Purpose.DISPATCH_ROWS, "forward", "tensor", "all_to_all", 1, 10),
        Transfer(Purpose.DISPATCH_ROWS, "backward", "tensor", "all_to_all", 1, 30),
    ]
    other = [Transfer(Purpose.STAGE_OUTPUTS, "forward", "previous_stage", "send", 1, 5)]
    assert expected_amounts([own, other]) == {
        ("stage outputs", "stages", "send"): Amount(2, 3, 25),
        ("dispatch rows", "tensor", "all_to_all"): Amount(1, 2, 40),
    }


def test_categories_say_what_each_rank_stands_still_for() -> None:
    found, _ = two_steps()
    dispatch, reduce = category_times(found, 2, 2)
    assert (dispatch.category, reduce.category) == ("dispatch", "reduce")
    assert dispatch.waiting == pytest.approx([0, 0])
    assert dispatch.moving == pytest.approx([0.1, 0.1])
    assert reduce.waiting == pytest.approx([0.3, 0]) and reduce.moving == pytest.approx([0.1, 0.1])


def _two_groups() -> Joined:
    """A slow pair and a fast one."""
    slow, fast = {"ranks": (0, 1)}, {"ranks": (2, 3)}
    return joined(
        *([event(1.0, 1.0 + 0.8, **slow)] for _ in range(2)),
        *([event(1.0, 1.0 + 0.2, **fast)] for _ in range(2)),
    )


def test_groups_are_looked_at_one_by_one() -> None:
    first, second = group_rows(_two_groups(), 1)
    assert (first.ranks, second.ranks) == ("0, 1", "2, 3")
    assert first.bus_bandwidth == pytest.approx(1250)
    assert second.bus_bandwidth == pytest.approx(5000)
    assert first.moving == pytest.approx(0.8) and first.calls == 1


def test_nothing_is_nothing() -> None:
    empty = joined([], [])
    assert summarise(empty, 1, {}) == [] == group_rows(empty, 1) == category_times(empty, 1, 2)

"""Who waited for whom."""

from __future__ import annotations

import numpy as np
import pytest

from tests.profiling.made_up import event, joined, of_rank, two_steps
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.clock import ClockReading, on_main_clock
from uoe_parallel.profiling.join import Joined, packed


def test_the_last_arrival_ends_the_waiting() -> None:
    found = joined([event(1.0, 1.5)], [event(1.3, 1.5)])
    assert of_rank(found, 0, "waiting") == [0.3] and of_rank(found, 0, "moving") == [0.2]
    assert of_rank(found, 1, "waiting") == [0.0] and of_rank(found, 1, "moving") == [0.2]
    assert found.events["last"].tolist() == [1, 1]


def test_an_offset_of_clocks_is_removed() -> None:
    found = joined([event(1.0, 1.5)], [event(6.3, 6.5)], offsets=(0.0, -5.0))
    assert of_rank(found, 0, "waiting") == [0.3] and of_rank(found, 1, "waiting") == [0.0]
    assert of_rank(found, 1, "started") == [1.3]


def test_a_drift_of_clocks_is_removed() -> None:
    """A clock that is 5 s ahead at first and 5.4 s after 4 of its seconds."""
    times = np.array([100.0, 102.0, 104.0])
    on_main = on_main_clock(times, ClockReading(100.0, -5.0), ClockReading(104.0, -5.4))
    assert on_main == pytest.approx([95.0, 96.8, 98.6])


def test_calls_are_matched_by_their_number_on_the_group() -> None:
    """Whatever else a rank does between them, and in whatever order callers went on."""
    other = {"ranks": (0, 2), "axis": "data"}
    found = joined(
        [event(3.0, 3.1, number=1), event(1.0, 1.5), event(2.0, 2.5, **other)],
        [event(1.2, 1.5), event(2.7, 3.1, number=1)],
        [event(2.1, 2.5, **other)],
    )
    assert len(found.groups) == 2 and found.events["call"].max() == 2
    by_call = {tuple(found.events["rank"][found.events["call"] == call]) for call in range(3)}
    assert by_call == {(0, 1), (0, 2)}
    assert sorted(of_rank(found, 0, "waiting")) == [0.0, 0.1, 0.2]
    assert of_rank(found, 1, "waiting") == [0.0, 0.3]


def test_a_call_that_another_rank_left_out_shifts_no_others() -> None:
    found = joined([event(1.0, 1.1), event(9.0, 9.1, number=1)], [event(8.9, 9.1, number=1)])
    assert of_rank(found, 0, "waiting") == [0.0, 0.0] and of_rank(found, 1, "waiting") == [0.1]


def test_the_expected_name_of_an_axis_goes_first() -> None:
    """Where the data group is the world, an event may bear either name."""
    rows, names = packed(
        [event(1.0, 2.0)], 0, {(Purpose.DENSE_BLOCKS, "all_reduce", (0, 1)): "data"}
    )
    assert [kind["axis"] for kind in names["kinds"]] == ["data"] and len(rows) == 1


def _sent(
    sender: tuple[float, float], receiver: tuple[float, float], axes: tuple[str, str]
) -> Joined:
    common = {"ranks": (0, 1), "purpose": "stage outputs"}
    return joined(
        [event(*sender, operation="send", axis=axes[0], **common)],
        [event(*receiver, operation="recv", axis=axes[1], payload=0, **common)],
    )


def test_a_send_has_two_ends() -> None:
    found = _sent((1.0, 1.5), (1.4, 1.6), ("next_stage", "pipe"))
    assert len(found.groups) == 1 and found.groups[0].name == "0 to 1"
    assert {kind.axis for kind in found.kinds} == {"stages"}
    assert {kind.operation for kind in found.kinds} == {"send"}
    assert of_rank(found, 0, "waiting") == [0.4] and of_rank(found, 1, "waiting") == [0.0]
    late_sender = _sent((2.0, 2.1), (1.5, 2.2), ("next_stage", "pipe"))
    assert of_rank(late_sender, 1, "waiting") == [0.5]


def test_who_is_done_before_the_other_comes_did_not_wait() -> None:
    """The backend took the message from the sender."""
    found = _sent((1.0, 1.1), (1.4, 1.6), ("next_stage", "pipe"))
    assert of_rank(found, 0, "waiting") == [0.0] and of_rank(found, 0, "moving") == [0.1]


def test_both_directions_between_two_stages_are_apart() -> None:
    """In the order of 1F1B: each rank sends before it receives, and so numbers them differently."""
    ways = {"ranks": (0, 1), "axis": "next_stage"}
    found = joined(
        [event(1.0, 1.2, operation="send", **ways), event(2.0, 2.6, operation="recv", **ways)],
        [event(0.5, 1.2, operation="recv", **ways), event(2.5, 2.6, operation="send", **ways)],
    )
    assert [group.name for group in found.groups] == ["0 to 1", "1 to 0"]
    assert of_rank(found, 0, "waiting") == [0.0, 0.5] and of_rank(found, 1, "waiting") == [0.5, 0.0]


def test_what_is_hidden_is_not_stood_still_for() -> None:
    """Called at 1.0, over at 2.0; rank 0 works until 1.8 and rank 1, which comes at 1.5, past the
    end."""
    found = joined(
        [event(1.0, 2.0, waited=1.8, is_async=True)],
        [event(1.5, 2.0, waited=2.3, finished=2.3, is_async=True)],
    )
    assert of_rank(found, 0, "hidden") == [0.8] and of_rank(found, 1, "hidden") == [0.5]
    assert of_rank(found, 0, "blocked") == [0.2] and of_rank(found, 1, "blocked") == [0.0]
    assert of_rank(found, 0, "waiting") == [0.5] and of_rank(found, 0, "moving") == [0.5]
    assert of_rank(found, 0, "blocked_waiting") == [0.0]


def test_large_groups_are_named_by_a_few() -> None:
    ranks = tuple(range(0, 512, 8))
    found = joined([event(1.0, 2.0, ranks=ranks)])
    assert found.groups[0].name == "0, 8, 16, ... 504" and found.groups[0].size == 64


def test_no_events_are_no_calls() -> None:
    assert len(joined([], []).events) == 0


def test_two_steps_come_out_alike() -> None:
    found, _ = two_steps()
    assert of_rank(found, 0, "waiting") == [0.3, 0.0, 0.3, 0.0]
    assert of_rank(found, 1, "moving") == [0.1, 0.3, 0.1, 0.3]

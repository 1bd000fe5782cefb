"""Clocks and isolated collectives on real ranks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import Ranks
from tests.model.cases import start
from tests.profiling.made_up import event, joined
from tests.tiny import tiny_config
from uoe_parallel.analysis.observe import CollectiveObserver
from uoe_parallel.analysis.transfer import group_ranks
from uoe_parallel.parallel.device import use_device
from uoe_parallel.profiling import alone, clock
from uoe_parallel.profiling.alone import Alone, bandwidths, measure_alone, sweep
from uoe_parallel.profiling.summary import Size


def _offset_of_a_shifted_clock() -> float:
    if dist.get_rank() == 1:
        clock.perf_counter = lambda: time.perf_counter() + 5.0  # pyright: ignore
    try:
        assert dist.group.WORLD is not None
        return clock.read_clock(dist.group.WORLD).offset
    finally:
        clock.perf_counter = time.perf_counter


def test_clocks_of_other_hosts_are_found(ranks: Ranks) -> None:
    """Ranks of one host have one clock, here but for what was added to it."""
    first, second = ranks(2).run(_offset_of_a_shifted_clock)
    assert first == 0 and second == pytest.approx(-5.0, abs=1.0)


def test_the_fastest_round_trip_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that is 5 s ahead; the answer to a slow question came late."""
    asked = [10.0 * trip for trip in range(clock.ROUND_TRIPS)]
    took = [1.0] * clock.ROUND_TRIPS
    took[3] = 0.25
    ticks = iter(time for trip in zip(asked, took, strict=True) for time in (trip[0], sum(trip)))
    answers = iter(begin - 5.0 + (0.125 if trip == 3 else 0.9) for trip, begin in enumerate(asked))
    monkeypatch.setattr(clock, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(clock.comm, "send", lambda *_: None)
    monkeypatch.setattr(clock.comm, "receive", lambda time, *_: time.fill_(next(answers)))
    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    assert clock.read_clock(group) == clock.ClockReading(30.125, -5.0)


Sent = dict[str, set[int]]
"""By operation, the bytes of calls."""


def _measured(parallel: dict[str, Any], sizes: list[Size]) -> tuple[list[Alone], Sent]:
    """And what a rank really put into its calls on the tensor group."""
    groups = start(tiny_config(parallel=parallel))
    with CollectiveObserver(groups) as observer:
        found = measure_alone(sizes, groups, use_device(0))
    own = group_ranks(groups).get("tensor")
    return found, {
        operation: {call.payload for call in calls}
        for (operation, ranks), calls in observer.calls.items()
        if ranks == own and operation in alone.SWEPT
    }


def test_all_groups_of_an_axis_are_measured(ranks: Ranks) -> None:
    """Also where ranks have no part in some, and a payload that the ranks don't divide."""
    sizes = [
        Size("tied_stages", "all_reduce", 64),
        Size("stages", "send", 1000),
        Size("pipe", "broadcast", 8),
        *(Size("tensor", operation, 1002) for operation in alone.SWEPT),
    ]
    (found, sent), *others = ranks(4).run(_measured, {"tensor": 2, "pipeline": 2}, sizes)
    assert [measured for measured, _ in others] == [[], [], []]
    assert [one.size for one in found] == [size for size in sizes for _ in _groups_of(size)]
    assert sorted(one.ranks for one in found) == sorted(
        group for size in sizes for group in _groups_of(size)
    )
    assert all(one.seconds > 0 for one in found)
    # 1002 bytes in floats of four, an even number of them where each of two ranks gets a part.
    payloads = {"all_reduce": 1004, "all_gather": 1004, "reduce_scatter": 1008, "all_to_all": 1008}
    assert sent == {operation: {payload} for operation, payload in payloads.items()}
    for one in found:
        operation = one.size.operation
        is_swept = one.size.axis == "tensor"
        payload = payloads[operation] if is_swept else one.size.payload
        assert one.algorithm_bandwidth * one.seconds == pytest.approx(payload)
        over_link = payload / 2 if operation in ("reduce_scatter", "all_to_all") else payload
        assert one.bus_bandwidth * one.seconds == pytest.approx(over_link)
    assert bandwidths(found).keys() == set(sizes)


def _groups_of(size: Size) -> list[str]:
    if size.axis == "stages":
        return ["0 to 2", "1 to 3", "2 to 0", "3 to 1"]
    return ["0, 1", "2, 3"] if size.axis == "tensor" else ["0, 2", "1, 3"]


def test_longer_pipelines_have_their_ends_tied(ranks: Ranks) -> None:
    sizes = [Size("tied_stages", "all_reduce", 64), Size("stages", "send", 64)]
    found, _ = ranks(3).run(_measured, {"pipeline": 3}, sizes)[0]
    assert [one.ranks for one in found][:1] == ["0, 2"]
    assert sorted(one.ranks for one in found[1:]) == ["0 to 1", "1 to 0", "1 to 2", "2 to 1"]


def test_first_calls_do_not_count() -> None:
    size = Size("tensor", "all_reduce", 1000)
    takes = [1.0] * alone.WARMUP + [0.1] * alone.TRIALS
    events = [
        event(10.0 * number, 10.0 * number + seconds, step=0, number=number)
        for number, seconds in enumerate(takes)
    ]
    (one,) = alone._results(joined(events, events), [size])
    assert one.seconds == pytest.approx(0.1)
    assert one.algorithm_bandwidth == pytest.approx(1e4)


def _swept(parallel: dict[str, Any], long: float) -> list[Alone]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alone, "SWEPT_BYTES", (1024, 4096))
        patch.setattr(alone, "LONG", long)
        return sweep(start(tiny_config(parallel=parallel)), use_device(0))


@pytest.mark.parametrize(("long", "sizes"), [(60.0, {1024, 4096}), (0.0, {1024})])
def test_a_sweep_is_of_all_axes_that_have_groups(
    ranks: Ranks, long: float, sizes: set[int]
) -> None:
    """And of all sizes, up to the first that takes long."""
    found = ranks(2).run(_swept, {"pipeline": 2}, long)[0]
    assert {(one.size.axis, one.size.operation) for one in found} == {
        *(("world", operation) for operation in alone.SWEPT),
        ("stages", "send"),
    }
    assert {one.size.payload for one in found} == sizes

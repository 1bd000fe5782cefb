"""Clocks and isolated collectives on real ranks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import Ranks
from tests.model.cases import start
from tests.tiny import tiny_config
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


def _measured(parallel: dict[str, Any], sizes: list[Size]) -> list[Alone]:
    return measure_alone(sizes, start(tiny_config(parallel=parallel)), use_device(0))


def test_all_groups_of_an_axis_are_measured(ranks: Ranks) -> None:
    """Also where ranks have no part in some, and a payload that the ranks don't divide."""
    sizes = [
        Size("tied_stages", "all_reduce", 64),
        Size("stages", "send", 1000),
        Size("pipe", "broadcast", 8),
        *(Size("tensor", operation, 1002) for operation in alone.SWEPT),
    ]
    found, *others = ranks(4).run(_measured, {"tensor": 2, "pipeline": 2}, sizes)
    assert others == [[], [], []]
    assert [one.size for one in found] == [size for size in sizes for _ in _groups_of(size)]
    assert sorted(one.ranks for one in found) == sorted(
        group for size in sizes for group in _groups_of(size)
    )
    assert all(one.seconds > 0 for one in found)
    for one in found:
        if one.size.operation == "all_to_all":
            assert one.bus_bandwidth == pytest.approx(one.algorithm_bandwidth / 2)
    assert bandwidths(found).keys() == set(sizes)


def _groups_of(size: Size) -> list[str]:
    if size.axis == "stages":
        return ["0 to 2", "1 to 3", "2 to 0", "3 to 1"]
    return ["0, 1", "2, 3"] if size.axis == "tensor" else ["0, 2", "1, 3"]


def test_longer_pipelines_have_their_ends_tied(ranks: Ranks) -> None:
    sizes = [Size("tied_stages", "all_reduce", 64), Size("stages", "send", 64)]
    found = ranks(3).run(_measured, {"pipeline": 3}, sizes)[0]
    assert [one.ranks for one in found][:1] == ["0, 2"]
    assert sorted(one.ranks for one in found[1:]) == ["0 to 1", "1 to 0", "1 to 2", "2 to 1"]


def _swept(parallel: dict[str, Any]) -> list[Alone]:
    alone.SWEPT_BYTES = (1024, 4096)
    return sweep(start(tiny_config(parallel=parallel)), use_device(0))


def test_a_sweep_is_of_all_axes_that_have_groups(ranks: Ranks) -> None:
    found = ranks(2).run(_swept, {"pipeline": 2})[0]
    assert {(one.size.axis, one.size.operation) for one in found} == {
        *(("world", operation) for operation in alone.SWEPT),
        ("stages", "send"),
    }
    assert {one.size.payload for one in found} <= {1024, 4096}

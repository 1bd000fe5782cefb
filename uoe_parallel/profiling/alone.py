"""Collectives with nothing else going on: what the links of each group give now, by size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.transfer import group_ranks
from uoe_parallel.parallel.agreement import broadcast_json
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.bandwidth import moved
from uoe_parallel.profiling.clock import read_clock
from uoe_parallel.profiling.events import Event
from uoe_parallel.profiling.join import STAGES, Joined, gather_events
from uoe_parallel.profiling.summary import Row, Size

TRIALS = 7
WARMUP = 2
"""Calls before them: backends make connections and buffers when they first need them."""
SWEPT_BYTES = tuple(4**power for power in range(5, 14))
"""1 KiB to 64 MiB."""
SWEPT = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_MEASURED = (*SWEPT, "broadcast", "send")
LONG = 0.1
"""Seconds of a call from which a sweep takes no larger ones on that axis."""


@dataclass(frozen=True)
class Alone:
    """One size on one group."""

    size: Size
    ranks: str
    """For people, as `join.Group.name`."""
    seconds: float
    """Of the middle one of several calls, from the arrival of the last rank."""
    algorithm_bandwidth: float
    bus_bandwidth: float
    """Bytes a second; see `bandwidth`."""


def sizes_of(rows: Iterable[Row]) -> list[Size]:
    """What to measure for these rows, each once."""
    sizes = dict.fromkeys(row.size for row in rows if row.typical_payload > 0)
    return [size for size in sizes if size.operation in _MEASURED]


def measure_alone(sizes: Sequence[Size], groups: ParallelGroups, device: Device) -> list[Alone]:
    """Each size on all groups of its axis at once, as in a step. Collective over all ranks.

    sizes: of rank 0; what others pass is ignored. The results are on rank 0 alone.
    """
    told = broadcast_json([[s.axis, s.operation, s.payload] for s in sizes], groups.world)
    agreed = [Size(*size) for size in told]
    before = read_clock(groups.world)
    with _axes(groups, {size.axis for size in agreed}) as axes:
        events = [
            event
            for number, size in enumerate(agreed)
            for event in _measure(size, number, groups, axes, device)
        ]
    joined = gather_events(events, before, read_clock(groups.world), groups.world)
    return [] if joined is None else _results(joined, agreed)


def sweep(groups: ParallelGroups, device: Device) -> list[Alone]:
    """Collectives of growing sizes on every axis that has groups of several ranks. Collective; the
    results are on rank 0 alone."""
    names = {name: len(ranks) for name, ranks in group_ranks(groups).items()}
    cases = [
        (axis, operation)
        for axis in ("tensor", "expert", "expert_data", "data", "world")
        if names.get(axis, 1) > 1
        for operation in SWEPT
    ]
    cases += [(STAGES, "send")] if groups.pipe.size() > 1 else []
    found: list[Alone] = []
    for axis, operation in cases:
        for payload in SWEPT_BYTES:
            latest = measure_alone([Size(axis, operation, payload)], groups, device)
            found += latest
            if broadcast_json(max((a.seconds for a in latest), default=0.0), groups.world) > LONG:
                break
    return found


def bandwidths(alone: Iterable[Alone]) -> dict[Size, float]:
    """Bus bandwidth by size, over all groups of an axis: of their bytes in their time."""
    bus, seconds = defaultdict[Size, float](float), defaultdict[Size, float](float)
    for one in alone:
        bus[one.size] += one.bus_bandwidth * one.seconds
        seconds[one.size] += one.seconds
    return {size: bus[size] / seconds[size] for size in bus}


def _results(joined: Joined, sizes: Sequence[Size]) -> list[Alone]:
    calls = moved(joined)
    events = joined.events[calls.first]
    of: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for place, event in enumerate(events):
        if event["number"] % (WARMUP + TRIALS) >= WARMUP:
            of[int(event["step"]), int(event["group"])].append(place)
    results = []
    for (number, group), places in sorted(of.items()):
        seconds = max(median(calls.seconds[places].tolist()), 1e-9)
        results.append(
            Alone(
                size=sizes[number],
                ranks=joined.groups[group].name,
                seconds=seconds,
                algorithm_bandwidth=float(calls.payload[places[0]]) / seconds,
                bus_bandwidth=float(calls.bus[places[0]]) / seconds,
            )
        )
    return results


@contextmanager
def _axes(groups: ParallelGroups, wanted: set[str]) -> Iterator[dict[str, ProcessGroup]]:
    """Process groups of this rank by axis. Collective over all ranks."""
    names = ("tensor", "data", "pipe", "expert", "expert_data", "world")
    axes: dict[str, ProcessGroup] = {name: getattr(groups, name) for name in names}
    of_ranks = {tuple(dist.get_process_group_ranks(group)): group for group in axes.values()}
    # DeepSpeed's own, which no one gives away: with few ranks they are like another axis.
    for name in ("model", "tied_stages"):
        if (same := of_ranks.get(group_ranks(groups).get(name, ()))) is not None:
            axes[name] = same
    made: list[ProcessGroup] = []
    if "tied_stages" in wanted and groups.pipe.size() > 2:
        for ends in _tied_stages(groups.layout):
            group = dist.new_group(ends)
            if groups.rank in ends:
                assert isinstance(group, ProcessGroup)
                axes["tied_stages"] = group
                made.append(group)
    try:
        yield axes
    finally:
        for group in made:
            dist.destroy_process_group(group)


def _tied_stages(layout: ParallelLayout) -> list[list[int]]:
    """First and last rank of every pipeline."""
    stage = layout.world_size // layout.pipeline
    return [[rank, rank + layout.world_size - stage] for rank in range(stage)]


def _measure(
    size: Size,
    number: int,
    groups: ParallelGroups,
    axes: dict[str, ProcessGroup],
    device: Device,
) -> Iterator[Event]:
    """This rank's calls of one size, as events of "step" `number`."""
    if size.axis == STAGES:
        yield from _between_stages(size, number, groups, device)
    elif size.axis in axes and axes[size.axis].size() > 1:
        group = axes[size.axis]
        call, payload = _collective(size, group, device)
        ranks = tuple(dist.get_process_group_ranks(group))
        for trial in range(WARMUP + TRIALS):
            dist.barrier(group)
            yield _timed(call, size.operation, size.axis, ranks, number, trial, payload, device)


def _between_stages(
    size: Size, number: int, groups: ParallelGroups, device: Device
) -> Iterator[Event]:
    """To the next stage and back, first from even stages and then from odd ones, so that no rank
    has two neighbours to wait for at a time."""
    pipe, stage = groups.pipe, groups.stage
    ranks = dist.get_process_group_ranks(pipe)
    buffer = _floats(size.payload, device)
    for turn in (0, 1):
        lower = stage if stage % 2 == turn else stage - 1
        if lower < 0 or lower + 1 >= pipe.size():
            continue
        ends = (ranks[lower], ranks[lower + 1])
        for sender in (lower, lower + 1):
            sends = stage == sender
            other = 2 * lower + 1 - stage

            def call(sends: bool = sends, other: int = other) -> None:
                # comm.send would copy what is not contiguous and look up a purpose.
                if sends:
                    dist.send(buffer, group=pipe, group_dst=other)
                else:
                    dist.recv(buffer, group=pipe, group_src=other)

            for trial in range(WARMUP + TRIALS):
                operation, payload = ("send", 4 * buffer.numel()) if sends else ("recv", 0)
                yield _timed(call, operation, STAGES, ends, number, trial, payload, device)


def _collective(
    size: Size, group: ProcessGroup, device: Device
) -> tuple[Callable[[], object], int]:
    """A call, and the bytes that a rank puts in."""
    ranks = group.size()
    own = _floats(size.payload, device)
    payload = 4 * own.numel()
    if size.operation == "all_reduce":
        return lambda: dist.all_reduce(own, group=group), payload
    if size.operation == "all_gather":
        whole = own.new_empty(ranks * own.numel())
        return lambda: dist.all_gather_into_tensor(whole, own, group=group), payload
    if size.operation == "broadcast":
        sent = payload if group.rank() == 0 else 0
        return lambda: dist.broadcast(own, group=group, group_src=0), sent
    each = -(-own.numel() // ranks)
    parts = own.new_zeros(ranks * each)
    if size.operation == "reduce_scatter":
        part = own.new_empty(each)
        return lambda: dist.reduce_scatter_tensor(part, parts, group=group), 4 * parts.numel()
    assert size.operation == "all_to_all", size.operation
    received = torch.empty_like(parts)
    return lambda: dist.all_to_all_single(received, parts, group=group), 4 * parts.numel()


def _floats(size: int, device: Device) -> Tensor:
    return torch.zeros(max(1, -(-size // 4)), device=device.torch_device)


def _timed(
    call: Callable[[], object],
    operation: str,
    axis: str,
    ranks: tuple[int, ...],
    number: int,
    trial: int,
    payload: int,
    device: Device,
) -> Event:
    """Of size number `number`."""
    device.synchronize()
    started = perf_counter()
    call()
    device.synchronize()
    ended = perf_counter()
    kept = payload // len(ranks) if operation == "all_to_all" else 0
    return Event(
        operation=operation,
        ranks=ranks,
        axis=axis,
        purpose=Purpose.MEASUREMENT,
        phase="step",
        step=number,
        number=number * (WARMUP + TRIALS) + trial,
        payload=payload,
        kept=kept,
        started=started,
        waited=started,
        finished=ended,
        ended=ended,
        is_async=False,
    )

"""A short check of every group's collectives: whether results are right, and what they take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.doctor.faults import Fault, ranks_text
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.profiling.alone import Alone, measure_alone
from uoe_parallel.profiling.join import STAGES
from uoe_parallel.profiling.summary import Size

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
NUMBERS = 1024
"""That each rank hands to each other in a check of results."""
PAYLOAD = 1 << 18
"""Bytes that a rank puts into a timed call."""


@dataclass(frozen=True)
class Timed:
    """A collective on all groups of an axis."""

    axis: str
    operation: str
    groups: int
    seconds: float
    """Of the middle one of the groups."""
    slowest: float
    slowest_ranks: str
    bandwidth: float
    """Bytes a second of a rank, on the slowest one's links."""


def check_results(groups: ParallelGroups, device: Device) -> list[Fault]:
    """Whether this rank gets what it should from each of its groups. Collective over all ranks.

    Raises RuntimeError if another rank doesn't take part before the groups' time is over.
    """
    faults = []
    for axis, group in axes(groups).items():
        checks = {op: _is_right(op, group, device.torch_device) for op in OPERATIONS}
        if axis == "pipe":
            checks["send"] = _passes_on(group, device.torch_device)
        ranks = ranks_text(dist.get_process_group_ranks(group))
        faults += [
            Fault(
                f"{operation} over the {axis} group of {ranks} gives wrong results",
                "look at links and drivers of these nodes; NCCL_DEBUG=INFO tells which links are "
                "used",
            )
            for operation, is_right in checks.items()
            if not is_right
        ]
    return faults


def axes(groups: ParallelGroups) -> dict[str, ProcessGroup]:
    """This rank's groups of several ranks, by name: the same names on every rank."""
    names = ["world", "tensor", "data", "pipe"]
    names += ["expert", "expert_data"] if groups.layout.has_wide_experts else []
    every = {name: getattr(groups, name) for name in names}
    return {name: group for name, group in every.items() if group.size() > 1}


def _is_right(operation: str, group: ProcessGroup, device: torch.device) -> bool:
    size, rank = group.size(), group.rank()
    place = torch.arange(size, dtype=torch.float32, device=device)
    spread = torch.ones(NUMBERS, device=device)
    own, total = rank + 1, size * (size + 1) / 2
    if operation == "all_reduce":
        result, expected = own * spread, total * spread
        dist.all_reduce(result, group=group)
    elif operation == "broadcast":
        result, expected = own * spread, spread
        dist.broadcast(result, group=group, group_src=0)
    elif operation == "all_gather":
        result, expected = _blank(size, spread), torch.outer(place + 1, spread).flatten()
        dist.all_gather_into_tensor(result, own * spread, group=group)
    elif operation == "reduce_scatter":
        result, expected = _blank(1, spread), own * total * spread
        dist.reduce_scatter_tensor(
            result, torch.outer(own * (place + 1), spread).flatten(), group=group
        )
    else:
        assert operation == "all_to_all", operation
        result, expected = _blank(size, spread), torch.outer(size * place + rank, spread).flatten()
        sent = torch.outer(size * rank + place, spread).flatten()
        dist.all_to_all_single(result, sent, group=group)
    return torch.equal(result, expected)


def _blank(ranks: int, spread: Tensor) -> Tensor:
    return spread.new_zeros(ranks * spread.numel())


def _passes_on(pipe: ProcessGroup, device: torch.device) -> bool:
    """From the first stage to the last, each adding one."""
    stage = pipe.rank()
    passed = torch.zeros(NUMBERS, device=device)
    if stage > 0:
        dist.recv(passed, group=pipe, group_src=stage - 1)
    is_right = torch.equal(passed, torch.full_like(passed, stage))
    if stage + 1 < pipe.size():
        dist.send(passed + 1, group=pipe, group_dst=stage + 1)
    return is_right


def time_collectives(groups: ParallelGroups, device: Device) -> list[Timed]:
    """What the collectives of each axis take with nothing else going on. Collective over all ranks;
    the result is on rank 0 alone."""
    sizes = [Size(axis, op, PAYLOAD) for axis in axes(groups) for op in OPERATIONS]
    sizes += [Size(STAGES, "send", PAYLOAD)] if groups.pipe.size() > 1 else []
    return list(_by_axis(measure_alone(sizes, groups, device)))


def _by_axis(alone: Iterable[Alone]) -> Iterator[Timed]:
    of: defaultdict[Size, list[Alone]] = defaultdict(list)
    for one in alone:
        of[one.size].append(one)
    for size, found in of.items():
        slowest = max(found, key=lambda one: one.seconds)
        yield Timed(
            axis=size.axis,
            operation=size.operation,
            groups=len(found),
            seconds=median(one.seconds for one in found),
            slowest=slowest.seconds,
            slowest_ranks=slowest.ranks,
            bandwidth=slowest.bus_bandwidth,
        )

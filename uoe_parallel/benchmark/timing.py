"""Times of several things in turn, so that what slows a shared machine slows all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.purposes import Purpose


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        return cls(median(figures), min(figures), max(figures))


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    group: ProcessGroup,
    device: Device,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, of the slowest rank: the same on all ranks of `group`.

    A round calls every run once, each round beginning with the next one. All ranks start a run
    together. The first `warmup` rounds are not counted. Collective over the group, and every rank
    must pass the same names in the same order.
    """
    names = list(runs)
    seconds = torch.zeros(len(names), warmup + rounds, dtype=torch.float64)
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            device.synchronize()
            dist.barrier(group)
            start = perf_counter()
            runs[name]()
            device.synchronize()
            seconds[names.index(name), turn] = perf_counter() - start
    slowest = comm.max_over(seconds.to(device.torch_device), group, purpose=Purpose.MEASUREMENT)[
        :, warmup:
    ].tolist()
    return dict(zip(names, slowest, strict=True))


def ratios(seconds: list[float], other: list[float]) -> Spread:
    """Round by round, how many times as long the first took as the other."""
    return Spread.of([a / b for a, b in zip(seconds, other, strict=True)])

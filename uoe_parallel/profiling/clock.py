"""What the clocks of ranks say at the same moment.

`time.perf_counter` is one clock for all processes of a Linux host, but hosts began to count at
different times, and do not count equally fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

ROUND_TRIPS = 16


@dataclass(frozen=True)
class ClockReading:
    """How this rank's clock stood to rank 0's."""

    at: float
    """Seconds of this rank's clock."""
    offset: float
    """Seconds to add to it to have rank 0's."""


def read_clock(group: ProcessGroup) -> ClockReading:
    """Compare this rank's clock with that of rank 0 of `group`. Collective, rank after rank.

    As in Cristian's algorithm (Distributed Computing 3, 1989): rank 0's answer is taken for its
    time half-way between question and answer, of the fastest of several round trips. It is wrong
    by half of that trip at most.
    """
    time = torch.zeros(1, dtype=torch.float64)
    if group.rank() == 0:
        for rank in range(1, group.size()):
            for _ in range(ROUND_TRIPS):
                comm.receive(time, rank, group, Purpose.MEASUREMENT)
                time[0] = perf_counter()
                comm.send(time, rank, group, Purpose.MEASUREMENT)
        return ClockReading(perf_counter(), 0.0)
    trips: list[tuple[float, ClockReading]] = []
    for _ in range(ROUND_TRIPS):
        asked = perf_counter()
        comm.send(time, 0, group, Purpose.MEASUREMENT)
        comm.receive(time, 0, group, Purpose.MEASUREMENT)
        answered = perf_counter()
        middle = (asked + answered) / 2
        trips.append((answered - asked, ClockReading(middle, float(time) - middle)))
    return min(trips, key=lambda trip: trip[0])[1]


def on_main_clock(times: np.ndarray, before: ClockReading, after: ClockReading) -> np.ndarray:
    """Times of a rank's clock, float64 [...] seconds, as rank 0's clock told them: the offset is
    taken to have moved evenly between two readings."""
    drift = (after.offset - before.offset) / max(after.at - before.at, 1e-9)
    return times + before.offset + drift * (times - before.at)

"""Events that never were, whose results are known by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from uoe_parallel.profiling.clock import ClockReading, on_main_clock
from uoe_parallel.profiling.events import Event
from uoe_parallel.profiling.join import Joined, join, packed

TIMES = ("started", "waited", "finished", "ended")


def event(started: float, ended: float, **changes: Any) -> Event:
    """A blocking all-reduce of 1000 bytes in the tensor group (0, 1), in step 5."""
    fields: dict[str, Any] = {
        "operation": "all_reduce",
        "ranks": (0, 1),
        "axis": "tensor",
        "purpose": "dense blocks",
        "phase": "forward",
        "step": 5,
        "number": 0,
        "payload": 1000,
        "kept": 0,
        "started": started,
        "waited": started,
        "finished": ended,
        "ended": ended,
        "is_async": False,
    }
    return Event(**fields | changes)


def joined(*by_rank: list[Event], offsets: tuple[float, ...] = ()) -> Joined:
    """As rank 0 gets them; `offsets`: what is to be added to each rank's clock."""
    arrays, names = [], []
    for rank, events in enumerate(by_rank):
        rows, names_of_rank = packed(events, rank)
        if offsets:
            reading = ClockReading(0.0, offsets[rank])
            for time in TIMES:
                rows[time] = on_main_clock(rows[time], reading, reading)
        arrays.append(rows)
        names.append(names_of_rank)
    return join(arrays, names)


def of_rank(found: Joined, rank: int, field: str) -> list[float]:
    """A field of a rank's events, in the order of calls."""
    own = found.events[found.events["rank"] == rank]
    return np.round(own[field], 9).tolist()


def two_steps() -> tuple[Joined, np.ndarray]:
    """Of two ranks, and the steps' times: rank 1 comes 0.3 s late to a sum that takes 0.1 s, both
    then send tokens behind 0.2 s of their own work, and wait 0.1 s more."""
    events: list[list[Event]] = [[], []]
    for number, (step, begin) in enumerate(((5, 10.0), (6, 20.0))):
        rows: dict[str, Any] = {
            "operation": "all_to_all",
            "purpose": "dispatch rows",
            "payload": 2000,
            "kept": 500,
            "is_async": True,
            "step": step,
            "number": 2 * number + 1,
        }
        for rank, late in ((0, 0.0), (1, 0.3)):
            events[rank] += [
                event(begin + late, begin + 0.4, step=step, number=2 * number),
                event(begin + 0.4, begin + 0.7, **rows | {"waited": begin + 0.6}),
            ]
    steps = np.array([[(5, 10.0, 11.0), (6, 20.0, 21.0)]] * 2)
    return joined(*events), steps

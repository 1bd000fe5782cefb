"""Bytes a second that collectives reach.

Two figures, as in the PERFORMANCE page of nccl-tests. The algorithm's bandwidth is what a rank puts
in (`Transfer.payload`) over the time of moving. The bus bandwidth is what has to leave or enter a
rank over that time, by the best algorithms there are, and can be held against the speed of its
link. With n ranks and a payload S these are

    all_reduce      2 (n - 1) / n S
    all_gather      (n - 1) S          (S is the rank's shard)
    reduce_scatter  (n - 1) / n S      (S is the whole)
    all_to_all      S - what a rank keeps
    send, broadcast S
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uoe_parallel.profiling.join import ONE_SIDED, Joined


@dataclass(frozen=True)
class Calls:
    """What matched calls moved: [calls] each, in the order of `Joined.events`."""

    first: np.ndarray
    """Place of each call's first event."""
    payload: np.ndarray
    """Bytes of a rank, on average; of the one that sends where only one does."""
    bus: np.ndarray
    """Bytes over a rank's link, likewise."""
    seconds: np.ndarray
    """Of moving, on average of ranks; of the slower end where one sends."""


def bus_bytes(
    operation: str, payload: np.ndarray, kept: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """[N] bytes over a rank's link, of [N] payloads in groups of [N] ranks."""
    factors = {
        "all_reduce": 2 * (size - 1) / size,
        "all_gather": size - 1,
        "reduce_scatter": (size - 1) / size,
    }
    return (payload - kept) * factors.get(operation, 1)


def moved(joined: Joined) -> Calls:
    """Of each call; the algorithm's bandwidth is `payload / seconds`, the bus bandwidth
    `bus / seconds`."""
    events = joined.events
    first = np.flatnonzero(np.diff(events["call"], prepend=-1))
    if not len(first):
        return Calls(*(np.zeros(0, dtype) for dtype in (int, float, float, float)))
    operations = joined.of_kind("operation")
    size = np.array([group.size for group in joined.groups])[events["group"]]
    bus = np.zeros(len(events))
    for operation in np.unique(operations):
        of = operations == operation
        bus[of] = bus_bytes(operation, events["payload"][of], events["kept"][of], size[of])
    ranks = np.diff(first, append=len(events))
    one_sided = np.isin(operations[first], ONE_SIDED)

    def of_calls(values: np.ndarray) -> np.ndarray:
        mean = np.add.reduceat(values.astype(float), first) / ranks
        return np.where(one_sided, np.maximum.reduceat(values, first), mean)

    return Calls(first, of_calls(events["payload"]), of_calls(bus), of_calls(events["moving"]))

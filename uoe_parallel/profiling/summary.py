"""What the events of some steps come to, by purpose and group: measured, and beside it expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.parallel.purposes import Category, Purpose
from uoe_parallel.profiling.bandwidth import Calls, moved
from uoe_parallel.profiling.join import Joined, common_axis

CATEGORIES: tuple[Category, ...] = get_args(Category)
DEPEND_ON_ROUTES = ("dispatch", "combine")
"""Categories whose bytes are expected of drawn routes."""

Key = tuple[str, str, str]
"""Purpose, axis and operation: what a row is about."""


@dataclass(frozen=True)
class Size:
    """An isolated collective that is like those of a row."""

    axis: str
    operation: str
    payload: int
    """Bytes that a rank puts in, as `Transfer.payload` counts them."""


@dataclass(frozen=True)
class Amount:
    """Of all ranks together in a step."""

    ranks: int
    """That take part."""
    calls: float
    payload: float
    """Bytes."""

    @property
    def calls_each(self) -> float:
        """Of a rank, on average."""
        return self.calls / max(self.ranks, 1)

    @property
    def payload_each(self) -> float:
        return self.payload / max(self.ranks, 1)


@dataclass(frozen=True)
class Row:
    """All collectives of a purpose on the groups of an axis. Seconds are of a rank in a step."""

    category: Category
    purpose: str
    axis: str
    operation: str
    measured: Amount | None
    """None where there were none, although some were expected."""
    expected: Amount | None
    """Likewise the other way round."""
    seconds: float
    """From call to end, on average of the ranks that take part: waiting and moving."""
    waiting: float
    """Of these, until the last rank had come."""
    hidden: float
    """Of these, while the caller did other work."""
    least: float
    most: float
    """The `seconds` of the ranks that have least and most of them."""
    late_rank: int | None
    """The rank that the others waited for longest."""
    late_seconds: float
    """For how long they did, all together in a step."""
    typical_payload: int
    """Bytes of the middle one of all calls."""
    algorithm_bandwidth: float | None
    bus_bandwidth: float | None
    """Bytes a second; see `bandwidth`."""
    alone_bandwidth: float | None = None
    """Bus bandwidth of the row's `size` when nothing else goes on, where that was measured."""

    @property
    def size(self) -> Size:
        return Size(self.axis, self.operation, self.typical_payload)

    @property
    def as_expected(self) -> bool:
        """Whether all ranks together made the expected calls with the expected bytes."""
        return self.measured == self.expected


@dataclass(frozen=True)
class CategoryTime:
    """How long a category makes the ranks stand still: seconds of a step."""

    category: Category
    waiting: list[float]
    moving: list[float]
    """By rank."""


@dataclass(frozen=True)
class GroupRow:
    """One group, with all its collectives of an operation."""

    axis: str
    ranks: str
    """For people, as `join.Group.name`."""
    operation: str
    calls: float
    """Of a rank in a step."""
    waiting: float
    moving: float
    """Seconds of a rank in a step."""
    bus_bandwidth: float | None


def summarise(joined: Joined, steps: int, expected: Mapping[Key, Amount]) -> list[Row]:
    """A row for each purpose, axis and operation, by category and then by time.

    steps: how many were recorded; expected: of `expected_amounts`.
    """
    calls = moved(joined)
    kinds: dict[Key, list[int]] = {}
    for number, kind in enumerate(joined.kinds):
        kinds.setdefault((kind.purpose, kind.axis, kind.operation), []).append(number)
    rows = []
    for key in dict.fromkeys([*kinds, *expected]):
        mine = np.isin(joined.events["kind"], kinds.get(key, []))
        row = _measured(joined, calls, mine, steps) if mine.any() else _NOT_MEASURED
        row |= {"category": Purpose(key[0]).category, "expected": expected.get(key)}
        row |= dict(zip(("purpose", "axis", "operation"), key, strict=True))
        rows.append(Row(**row))
    return sorted(rows, key=lambda row: (CATEGORIES.index(row.category), -row.seconds))


def expected_amounts(by_rank: Iterable[Iterable[Transfer]]) -> dict[Key, Amount]:
    """Of all ranks' `step_traffic`."""
    amounts: dict[Key, Amount] = {}
    for transfers in by_rank:
        own: dict[Key, tuple[int, int]] = {}
        for transfer in transfers:
            key = (
                str(transfer.purpose),
                common_axis(transfer.group, transfer.operation),
                transfer.operation,
            )
            calls, payload = own.get(key, (0, 0))
            own[key] = calls + transfer.calls, payload + transfer.payload
        for key, (calls, payload) in own.items():
            so_far = amounts.get(key, Amount(0, 0, 0))
            amounts[key] = Amount(so_far.ranks + 1, so_far.calls + calls, so_far.payload + payload)
    return amounts


def category_times(joined: Joined, steps: int, world_size: int) -> list[CategoryTime]:
    """Of the categories that there are."""
    events = joined.events
    category = np.array([CATEGORIES.index(Purpose(kind.purpose).category) for kind in joined.kinds])
    of_event = category[events["kind"]] if len(category) else events["kind"]
    found = []
    for number, name in enumerate(CATEGORIES):
        own = events[of_event == number]
        if not len(own):
            continue
        waiting, blocked = (
            np.bincount(own["rank"], own[field], world_size) / steps
            for field in ("blocked_waiting", "blocked")
        )
        found.append(CategoryTime(name, waiting.tolist(), (blocked - waiting).tolist()))
    return found


def group_rows(joined: Joined, steps: int) -> list[GroupRow]:
    """Of every group by itself, which may show one slow link among many."""
    calls, events = moved(joined), joined.events
    operations = list(dict.fromkeys(kind.operation for kind in joined.kinds))
    of_kind = np.array([operations.index(kind.operation) for kind in joined.kinds], dtype=int)
    # One number for a group with an operation: there may be thousands of groups.
    key = events["group"] * len(operations) + of_kind[events["kind"]]
    keys, first, place = np.unique(key, return_index=True, return_inverse=True)

    def sums(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        return np.bincount(places, values, len(keys))

    number = np.bincount(place, minlength=len(keys))
    waiting, moving = (sums(events[field], place) for field in ("waiting", "moving"))
    bus, seconds = (sums(of, place[calls.first]) for of in (calls.bus, calls.seconds))
    rows = []
    for n, event in enumerate(events[first]):
        group, kind = joined.groups[event["group"]], joined.kinds[event["kind"]]
        share = 1 / (steps * group.size)
        rows.append(
            GroupRow(
                axis=kind.axis,
                ranks=group.name,
                operation=kind.operation,
                calls=float(number[n]) * share,
                waiting=float(waiting[n]) * share,
                moving=float(moving[n]) * share,
                bus_bandwidth=_rate(bus[n], seconds[n]),
            )
        )
    return sorted(rows, key=lambda row: (row.axis, row.operation, -row.moving))


_NOT_MEASURED: dict[str, Any] = {
    **dict.fromkeys(("seconds", "waiting", "hidden", "least", "most", "late_seconds"), 0.0),
    **dict.fromkeys(("measured", "late_rank", "algorithm_bandwidth", "bus_bandwidth")),
    "typical_payload": 0,
}
"""As `_measured`, of nothing."""


def _measured(joined: Joined, calls: Calls, mine: np.ndarray, steps: int) -> dict[str, Any]:
    """Fields of the row of these events: `mine`, bool [N]."""
    events, of_row = joined.events[mine], mine[calls.first]
    puts_in = events[~joined.of_kind("receives")[mine]]
    ranks = np.unique(events["rank"])
    by_rank = np.bincount(events["rank"], events["ended"] - events["started"])[ranks] / steps
    late = np.bincount(events["last"], events["waiting"]) / steps
    share = 1 / (steps * len(ranks))
    seconds = calls.seconds[of_row].sum()
    return {
        "measured": Amount(
            ranks=len(np.unique(puts_in["rank"])),
            calls=len(puts_in) / steps,
            payload=int(puts_in["payload"].sum()) / steps,
        ),
        "seconds": float(by_rank.mean()),
        "waiting": float(events["waiting"].sum()) * share,
        "hidden": float(events["hidden"].sum()) * share,
        "least": float(by_rank.min()),
        "most": float(by_rank.max()),
        "late_rank": int(late.argmax()) if late.any() else None,
        "late_seconds": float(late.max()),
        "typical_payload": _middle(puts_in["payload"]),
        "algorithm_bandwidth": _rate(calls.payload[of_row].sum(), seconds),
        "bus_bandwidth": _rate(calls.bus[of_row].sum(), seconds),
    }


def _middle(values: np.ndarray) -> int:
    """One of those that are not zero, so that it is a size that there was."""
    values = np.sort(values[values > 0])
    return int(values[len(values) // 2]) if len(values) else 0


def _rate(amount: float, seconds: float) -> float | None:
    return float(amount / seconds) if amount > 0 and seconds > 0 else None

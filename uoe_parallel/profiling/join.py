"""Events of all ranks brought together on rank 0: who waited for whom, and what moved how long.

The same call on all ranks of its group is found by its number among the calls of those ranks. The
last rank that arrives ends the waiting of the others; what follows is moving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.transfer import Phase
from uoe_parallel.parallel.agreement import gather_bytes, gather_json
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.clock import ClockReading, on_main_clock
from uoe_parallel.profiling.events import Event

STAGES = "stages"
"""Of sends between neighbouring stages, whichever end looks at them."""
ONE_SIDED = ("send", "broadcast", "scatter", "gather", "reduce")
"""Operations that may end for one rank before another has come."""

_TIMES = ("started", "waited", "finished", "ended")
_OWN = np.dtype(
    [(name, "i4") for name in ("kind", "group", "step", "number")]
    + [(name, "i8") for name in ("payload", "kept")]
    + [(name, "f8") for name in _TIMES]
)
_FOUND = [("rank", "i4"), ("call", "i8"), ("last", "i4")] + [
    (name, "f8") for name in ("waiting", "moving", "hidden", "blocked", "blocked_waiting")
]


Axes = Mapping[tuple[Purpose, str, tuple[int, ...]], str]
"""By purpose, operation and ranks what an axis is called: where two axes have the same ranks, an
event can't tell which of them a library meant."""


@dataclass(frozen=True)
class Kind:
    """What many events have in common."""

    operation: str
    """As `Event.operation`, but "send" for both ends of a send."""
    receives: bool
    """Whether this is the end of a send that puts nothing in."""
    axis: str
    """As `Event.axis`, but `STAGES` for sends, which only neighbouring stages need."""
    purpose: str
    phase: Phase

    @classmethod
    def of(cls, event: Event, axis: str) -> Kind:
        receives = event.operation == "recv"
        operation = "send" if receives else event.operation
        return cls(
            operation=operation,
            receives=receives,
            axis=common_axis(axis, operation),
            purpose=str(event.purpose),
            phase=event.phase,
        )


@dataclass(frozen=True)
class Group:
    """Where events took place: a group's ranks, or a send's two ends in its direction."""

    key: int
    """The same for the same ranks."""
    size: int
    name: str
    """Its ranks for people, such as "0, 8, 16, ... 504" or "0 to 4"."""

    @classmethod
    def of(cls, event: Event, rank: int) -> Group:
        ends = event.ranks
        if event.operation in ("send", "recv"):
            sends = event.operation == "send"
            other = ends[0] + ends[1] - rank
            ends = (rank, other) if sends else (other, rank)
            return cls(_key("send", ends), 2, f"{ends[0]} to {ends[1]}")
        few = ends if len(ends) <= 8 else (*ends[:3], "...", ends[-1])
        name = ", ".join(map(str, few)).replace("...,", "...")
        return cls(_key("", sorted(ends)), len(ends), name)


@dataclass(frozen=True)
class Joined:
    """All events of all ranks, on rank 0's clock."""

    kinds: list[Kind]
    groups: list[Group]
    events: np.ndarray
    """[N], a record each, all ranks' of a call side by side: `kind` and `group`, places in the
    lists above; `rank`, `step`, `number`; `payload` and `kept`, bytes; `started`, `waited`,
    `finished`, `ended`, seconds, as in `Event`; `call`, the same for all ranks of a call, from 0;
    `last`, the rank that arrived last at it; of the time from `started` to `ended`, `waiting` for
    that rank, `moving` what was to be sent, and of both `hidden` behind the caller's own work; and
    `blocked`, for how long the caller stood still, `blocked_waiting` of it for the last rank."""

    def of_kind(self, field: str) -> np.ndarray:
        """[N]: a field of each event's kind."""
        values = np.array([getattr(kind, field) for kind in self.kinds])
        return values[self.events["kind"]] if self.kinds else values.repeat(len(self.events))


def common_axis(axis: str, operation: str) -> str:
    """A name that all ranks of a call use: of a pair of stages each sees the next or the previous
    one, or with two of them the pipeline."""
    return STAGES if operation == "send" else axis


def gather_events(
    events: Sequence[Event],
    before: ClockReading,
    after: ClockReading,
    group: ProcessGroup,
    expected: Axes | None = None,
) -> Joined | None:
    """The events of all ranks of `group` on its rank 0, None on the others. Collective.

    before, after: this rank's clock at both ends of the recording; expected: see `packed`.
    """
    rows, names = packed(events, group.rank(), expected)
    for time in _TIMES:
        rows[time] = on_main_clock(rows[time], before, after)
    # Numbers as they are, and what they stand for once.
    all_names = gather_json(names, group)
    messages = gather_bytes(torch.from_numpy(rows.view(np.uint8).copy()), group)
    if group.rank() != 0:
        return None
    return join([message.numpy().view(_OWN) for message in messages], all_names)


def packed(
    events: Iterable[Event], rank: int, expected: Axes | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """A rank's events as an array of numbers, and the kinds and groups that it counts on, as
    JSON.

    expected: names of axes that go before those of the events.
    """
    kinds: dict[Kind, int] = {}
    groups: dict[Group, int] = {}
    of_ranks: dict[tuple[str, tuple[int, ...]], int] = {}
    rows = []
    for event in events:
        axis = (expected or {}).get((event.purpose, event.operation, event.ranks), event.axis)
        kind = kinds.setdefault(Kind.of(event, axis), len(kinds))
        ends = (event.operation if event.operation in ("send", "recv") else "", event.ranks)
        if (group := of_ranks.get(ends)) is None:
            group = groups.setdefault(Group.of(event, rank), len(groups))
            of_ranks[ends] = group
        numbers = (kind, group, event.step, event.number, event.payload, event.kept)
        rows.append((*numbers, event.started, event.waited, event.finished, event.ended))
    names = {"kinds": [asdict(kind) for kind in kinds], "groups": [asdict(g) for g in groups]}
    return np.array(rows, dtype=_OWN), names


def join(arrays: Sequence[np.ndarray], names: Sequence[dict[str, Any]]) -> Joined:
    """What `packed` made of each rank's events, with times on one clock."""
    kinds: dict[Kind, int] = {}
    groups: dict[Group, int] = {}
    events = np.zeros(sum(map(len, arrays)), dtype=_OWN.descr + _FOUND)
    start = 0
    for rank, (rows, known) in enumerate(zip(arrays, names, strict=True)):
        part = events[start : start + len(rows)]
        start += len(rows)
        for name in rows.dtype.names or ():
            part[name] = rows[name]
        part["rank"] = rank
        own_kinds = [kinds.setdefault(Kind(**kind), len(kinds)) for kind in known["kinds"]]
        own_groups = [groups.setdefault(Group(**g), len(groups)) for g in known["groups"]]
        if len(rows):
            part["kind"] = np.array(own_kinds)[rows["kind"]]
            part["group"] = np.array(own_groups)[rows["group"]]
    joined = Joined(list(kinds), list(groups), events)
    _match(joined)
    return joined


def _match(joined: Joined) -> None:
    """Sort by calls, and tell waiting from moving."""
    events = joined.events
    if not len(events):
        return
    key = ("group", "number")
    events[:] = events[np.lexsort([events["rank"], *(events[name] for name in reversed(key))])]
    new = np.ones(len(events), dtype=bool)
    new[1:] = np.any([events[name][1:] != events[name][:-1] for name in key], axis=0)
    starts = np.flatnonzero(new)
    events["call"] = call = new.cumsum() - 1
    arrival = np.maximum.reduceat(events["started"], starts)[call]
    # Of ranks that arrive together the first one stands for all.
    is_last = np.flatnonzero(events["started"] == arrival)[::-1]
    last = np.zeros(len(starts), dtype=int)
    last[call[is_last]] = events["rank"][is_last]
    events["last"] = last[call]
    _split(joined, arrival)


def _split(joined: Joined, arrival: np.ndarray) -> None:
    """`arrival`: [N], when the last rank of the call came."""
    events = joined.events
    alone = np.isin(joined.of_kind("operation"), ONE_SIDED) & (events["ended"] < arrival)
    arrival = np.where(alone, -np.inf, arrival)
    time = events["ended"] - events["started"]
    events["waiting"] = np.clip(arrival - events["started"], 0, time)
    events["moving"] = time - events["waiting"]
    events["hidden"] = np.clip(events["waited"] - events["started"], 0, time)
    events["blocked"] = events["finished"] - events["waited"]
    events["blocked_waiting"] = np.clip(arrival - events["waited"], 0, events["blocked"])


def _key(prefix: str, ranks: Sequence[int]) -> int:
    """Short, whatever the size of the group."""
    text = f"{prefix}{','.join(map(str, ranks))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

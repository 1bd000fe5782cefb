"""A profile in tables for people and as JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from uoe_parallel.analysis.report import in_bytes, plain_console
from uoe_parallel.profiling.alone import Alone
from uoe_parallel.profiling.summary import (
    DEPEND_ON_ROUTES,
    CategoryTime,
    GroupRow,
    Row,
    Size,
)


@dataclass(frozen=True)
class StepSeconds:
    """How long steps took the slowest rank, each."""

    counted: list[float]
    """Of those that were recorded."""
    plain: list[float]
    """Of others."""
    in_turns: bool
    """Whether these came in turns; otherwise `plain` are those before."""

    @property
    def cost(self) -> float | None:
        """Of counting, as a share of a step: by the ratio of medians."""
        if not (self.counted and self.plain):
            return None
        return median(self.counted) / median(self.plain) - 1


@dataclass(frozen=True)
class Profile:
    """What some steps of a run did between ranks."""

    layout: str
    world_size: int
    steps: list[int]
    """The recorded ones, from 0."""
    seconds: StepSeconds
    categories: list[CategoryTime]
    rows: list[Row]
    groups: list[GroupRow]
    alone: list[Alone]


def profile_as_json(profile: Profile) -> dict[str, Any]:
    """All of it in JSON's types: seconds, bytes, bytes a second."""
    tree = asdict(profile)
    tree["seconds"]["cost"] = profile.seconds.cost
    for row, entry in zip(profile.rows, tree["rows"], strict=True):
        entry["as_expected"] = row.as_expected
        entry["expected_of_drawn_routes"] = row.category in DEPEND_ON_ROUTES
    return tree


def print_profile(profile: Profile, stream: TextIO | None = None) -> None:
    """Tables on `stream` or standard output, without control codes where that is no terminal."""
    console = plain_console(stream)
    first, last = profile.steps[0], profile.steps[-1]
    console.print(
        f"Communication of {len(profile.steps)} training steps ({first} to {last}) on "
        f"{profile.world_size} ranks, {profile.layout}\n{_cost(profile.seconds)}\n"
    )
    if not profile.rows:
        console.print("One rank sends nothing.")
        return
    console.print(_categories(profile), "")
    console.print(_rows(profile.rows))
    console.print("\n".join(_notes(profile.rows)))
    if uneven := _unequal_groups(profile.alone):
        console.print("", _table("Groups of an axis, alone", _GROUP_HEADER, uneven))


def print_sweep(alone: Sequence[Alone], stream: TextIO | None = None) -> None:
    """A table for each axis, of all its groups at once: the slowest one's bandwidth."""
    console = plain_console(stream)
    if not alone:
        console.print("One rank sends nothing.")
    slowest: dict[Size, Alone] = {}
    for one in sorted(alone, key=lambda one: -one.bus_bandwidth):
        slowest[one.size] = one
    for axis in dict.fromkeys(one.size.axis for one in alone):
        mine = {(o.size.operation, o.size.payload): o for o in alone if o.size.axis == axis}
        operations = dict.fromkeys(operation for operation, _ in mine)
        rows = []
        for payload in sorted({payload for _, payload in mine}):
            found = (slowest.get(Size(axis, operation, payload)) for operation in operations)
            cells = (_rate(one.bus_bandwidth) if one else "" for one in found)
            rows.append([in_bytes(payload), *cells])
        # Not as the table's title, which rich would wrap to its width.
        console.out(f"Alone on all {axis} groups at once: the slowest group's bus bandwidth")
        header = ["BYTES", *(operation.upper() for operation in operations)]
        console.print(_table(None, header, rows), "")


def _table(title: str | None, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """`header`: titles of columns, those of numbers in capitals."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in header:
        number = column.isupper()
        table.add_column(
            column.lower() if number else column,
            justify="right" if number else "left",
            no_wrap=column != "purpose",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cost(seconds: StepSeconds) -> str:
    counted = f"{_ms(median(seconds.counted))} ms a step with the recorder"
    if seconds.cost is None:
        return counted
    how = "taken in turns" if seconds.in_turns else "the steps before"
    return (
        f"{counted}, {_ms(median(seconds.plain))} ms without it ({seconds.cost:+.1%}; medians of "
        f"{len(seconds.counted)} and {len(seconds.plain)} steps, {how})"
    )


def _categories(profile: Profile) -> Table:
    """How a step's time goes, of the mean and the extreme ranks."""
    step = sum(profile.seconds.counted) / len(profile.seconds.counted)
    rest = [step] * profile.world_size

    def row(name: str, waiting: list[float] | None, moving: list[float] | None) -> list[str]:
        both = [
            sum(pair) for pair in zip(waiting or rest, moving or [0.0] * len(rest), strict=True)
        ]
        mean = sum(both) / len(both)
        parts = ["" if part is None else _ms(sum(part) / len(part)) for part in (waiting, moving)]
        return [name, _ms(mean), f"{mean / step:.1%}", *parts, _ms(min(both)), _ms(max(both))]

    rows = []
    for found in profile.categories:
        rows.append(row(found.category, found.waiting, found.moving))
        gone = zip(rest, found.waiting, found.moving, strict=True)
        rest = [left - waiting - moving for left, waiting, moving in gone]
    rows.append(row("all else: compute", None, None))
    header = ["ranks stand still for", "MS", "OF A STEP", "WAITING", "MOVING", "LEAST", "MOST"]
    return _table("A step's time: mean over ranks, and the ranks with least and most", header, rows)


_ROW_HEADER = [
    *("purpose", "group", "operation", "CALLS", "BYTES", "EXPECTED", "MS", "WAITING", "HIDDEN"),
    *("LEAST-MOST", "LATE", "BANDWIDTH", "ALONE"),
]


def _rows(rows: Sequence[Row]) -> Table:
    title = "Of a rank in a step, from call to end"
    table = _table(title, _ROW_HEADER, [])
    category = None
    for row in rows:
        if row.category != category:
            category = row.category
            table.add_row(Text(category, style="bold"))
        table.add_row(*map(Text, _cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    measured = row.measured
    late = "" if row.late_rank is None else f"{row.late_rank}"
    return [
        f"  {row.purpose}",
        row.axis,
        row.operation,
        f"{measured.calls_each:,.4g}" if measured else "0",
        in_bytes(measured.payload_each) if measured else "0 B",
        _expected(row),
        _ms(row.seconds),
        _share(row.waiting, row.seconds),
        _share(row.hidden, row.seconds),
        f"{_ms(row.least)}-{_ms(row.most)}",
        late,
        _rate(row.bus_bandwidth),
        _rate(row.alone_bandwidth),
    ]


def _expected(row: Row) -> str:
    if row.as_expected:
        return "="
    if row.expected is None:
        return "none"
    measured, expected = row.measured, row.expected
    each = in_bytes(expected.payload_each)
    if measured is None or measured.calls == expected.calls:
        return each
    return f"{each} in {expected.calls_each:,.4g}"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "late: the rank that the others waited for longest. bandwidth: of the bus, while moving; "
        "alone: the same size with nothing else going on, just after."
    )
    differ = [row for row in rows if not row.as_expected]
    if any(row.category in DEPEND_ON_ROUTES for row in differ):
        yield (
            "expected: dispatch and combine are expected of evenly drawn routes; what they differ "
            "by is how the routes of this run are skewed."
        )
    if wrong := [row for row in differ if row.category not in DEPEND_ON_ROUTES]:
        names = ", ".join(dict.fromkeys(row.purpose for row in wrong))
        yield f"expected: these do not depend on routes and yet differ: {names}."
    else:
        yield "expected: all that does not depend on routes is exactly as expected (=)."


_GROUP_HEADER = [
    *(
        "group",
        "operation",
        "BYTES",
        "GROUPS",
        "slowest, ranks",
        "BANDWIDTH",
        "fastest, ranks",
        "BANDWIDTH",
    ),
]


def _unequal_groups(alone: Iterable[Alone]) -> list[list[str]]:
    """Of each axis with several groups, the largest size of each operation."""
    by_size: defaultdict[tuple[str, str], dict[int, list[Alone]]] = defaultdict(dict)
    for one in alone:
        sizes = by_size[one.size.axis, one.size.operation]
        sizes.setdefault(one.size.payload, []).append(one)
    rows = []
    for (axis, operation), sizes in by_size.items():
        found = sorted(sizes[max(sizes)], key=lambda one: one.bus_bandwidth)
        if len(found) > 1:
            ends = [(one.ranks, _rate(one.bus_bandwidth)) for one in (found[0], found[-1])]
            size = in_bytes(max(sizes))
            rows.append([axis, operation, size, str(len(found)), *ends[0], *ends[1]])
    return rows


def _ms(seconds: float) -> str:
    """With about three digits."""
    milliseconds = float(f"{1e3 * seconds:.3g}") if seconds < 1 else 1e3 * seconds
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:,.{digits}f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else ""


def in_bytes_per_second(bandwidth: float) -> str:
    """With a decimal prefix, as the speeds of links are told: "1.25 GB/s"."""
    for prefix in ("", "k", "M", "G"):
        if bandwidth < 999.5:
            return f"{bandwidth:.3g} {prefix}B/s"
        bandwidth /= 1000
    return f"{bandwidth:.3g} TB/s"


def _rate(bandwidth: float | None) -> str:
    return "" if bandwidth is None else in_bytes_per_second(bandwidth)

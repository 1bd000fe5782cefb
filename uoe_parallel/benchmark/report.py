"""Entries of sections as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

Entry = dict[str, Any]

_SHORTER = {1e12: "T", 1e9: "G", 1e6: "M"}


def say(text: str) -> None:
    # Without a terminal there are no control codes, whatever the environment says.
    console = Console(file=sys.stdout, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(Text(text), soft_wrap=True)


def section_text(section: Entry) -> str:
    """The table of one section on one number of ranks, and what is to be said below it."""
    ranks, threads = section["ranks"], section["threads"]
    heading = (
        f"{section['section'].replace('_', ' ')}, {ranks} process{'es' * (ranks > 1)} with "
        f"{threads} thread{'s' * (threads > 1)}{' each' * (ranks > 1)}"
    )
    rows = [e for e in section["entries"] if "compared" not in e and "not_measured" not in e]
    notes = [
        f"{_name(entry)}: not measured: {entry['not_measured']}"
        for entry in section["entries"]
        if "not_measured" in entry
    ]
    notes += [
        f"{entry['compared']}: {_cell(entry['ratio'])}"
        for entry in section["entries"]
        if "compared" in entry
    ]
    return "\n".join([heading, *_table(rows), *notes, ""])


def _name(entry: Entry) -> str:
    numbers = {"n": entry.get("experts"), "k": entry.get("top_k")}
    return ", ".join([entry["contender"], *(f"{k} {v}" for k, v in numbers.items() if v)])


def _table(entries: Sequence[Entry]) -> list[str]:
    """A column for each field, two for the times; lists of anything else are for the JSON."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    columns: list[list[str]] = []
    for name in names:
        values = [entry.get(name) for entry in entries]
        if name == "seconds":
            columns += _time_columns(values)
        elif not any(isinstance(value, list) for value in values):
            columns.append([_heading(name), *map(_cell, values)])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]


def _heading(name: str) -> str:
    return name.replace("_over_", " / ").replace("_", " ")


def _time_columns(values: Iterable[list[float] | None]) -> list[list[str]]:
    middles, spreads = ["median ms"], ["min - max"]
    for seconds in values:
        middles.append(f"{median(seconds) * 1e3:.1f}" if seconds else "")
        spreads.append(f"{min(seconds) * 1e3:.1f} - {max(seconds) * 1e3:.1f}" if seconds else "")
    return [middles, spreads]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        if set(value) != {"median", "smallest", "largest"}:
            return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
        return f"{value['median']:.2f} ({value['smallest']:.2f} - {value['largest']:.2f})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        for size, letter in _SHORTER.items():
            if value >= size:
                return f"{value / size:.2f} {letter}"
    return str(value)

"""What is wrong, in words that someone can act on, and on which ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Something that would keep a run from starting, finishing or being fast."""

    problem: str
    advice: str


@dataclass(frozen=True)
class Found:
    """A fault, and the ranks that have it; of none in particular if it has no ranks."""

    fault: Fault
    ranks: Sequence[int] = ()

    def __str__(self) -> str:
        where = f"{ranks_text(self.ranks)}: " if self.ranks else ""
        return f"{where}{self.fault.problem}\n  {self.fault.advice}"


def gathered(faults: Mapping[int, Sequence[Fault]]) -> list[Found]:
    """Faults by rank, each once, with all ranks that have it."""
    ranks_of: defaultdict[Fault, list[int]] = defaultdict(list)
    for rank, found in faults.items():
        for fault in found:
            ranks_of[fault].append(rank)
    return [Found(fault, ranks) for fault, ranks in ranks_of.items()]


def difference(what: str, values: Mapping[int, str], advice: str) -> list[Found]:
    """That ranks do not all have the same value of something, and who has which.

    values: by rank. Empty if all are equal.
    """
    ranks_of: defaultdict[str, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks_of[value].append(rank)
    if len(ranks_of) < 2:
        return []
    # Few ranks are more likely wrong than many.
    ordered = sorted(ranks_of.items(), key=lambda item: -len(item[1]))
    told = "; ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in ordered)
    return [Found(Fault(f"{what} differs between ranks: {told}", advice))]


def told(found: Sequence[Found]) -> str:
    """The faults, or that there are none."""
    if not found:
        return "No fault found"
    title = "1 fault" if len(found) == 1 else f"{len(found)} faults"
    return "\n".join([title, *(f"- {one}" for one in found)])


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-3, 6`"""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"

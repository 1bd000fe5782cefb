"""What a soak came to: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from uoe_parallel.analysis.report import plain_console, plain_table
from uoe_parallel.soak.injections import Outcome
from uoe_parallel.soak.schedule import Fault
from uoe_parallel.soak.session import RoundReport

_HEADER = "fault, INJECTED, NOTHING LOST, STEPS REPEATED AT MOST, SECONDS, AT MOST"


def print_report(reports: Sequence[RoundReport], seed: int, seconds: float) -> None:
    """On standard output."""
    console = plain_console()
    survived = sum(len(report.outcomes) for report in reports if report.nothing_lost)
    total = sum(len(report.outcomes) for report in reports)
    console.print()
    console.print(
        plain_table(
            f"{total} faults in {len(reports)} runs and {seconds:.0f} s (seed {seed}); seconds: "
            "until it trained again, median",
            _HEADER,
            _rows(reports),
        )
    )
    resharded = [r.largest_deviation for r in reports if r.planned.is_resharded]
    if resharded:
        console.print(f"\nLargest deviation of a loss after resharding: {max(resharded):.1e}")
    for report in reports:
        problems = dict.fromkeys([*(o.problem for o in report.outcomes), report.problem])
        for problem in filter(None, problems):
            faults = ", ".join(outcome.fault for outcome in report.outcomes)
            console.print(f"\nLOST in round {report.number} ({faults}): {problem}")
    console.print(f"\n{survived} of {total} faults survived with nothing lost")


def write_json(reports: Sequence[RoundReport], seed: int, seconds: float, path: Path) -> None:
    """The same, and every fault by itself."""
    tree = {"seed": seed, "seconds": seconds, "rounds": [_as_json(report) for report in reports]}
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _as_json(report: RoundReport) -> dict[str, Any]:
    return {
        "number": report.number,
        "nothing_lost": report.nothing_lost,
        "problem": report.problem,
        "reference": report.planned.reference,
        "asynchronous": report.planned.asynchronous,
        "largest_deviation": report.largest_deviation,
        "faults": [asdict(outcome) for outcome in report.outcomes],
    }


def _rows(reports: Sequence[RoundReport]) -> Iterator[tuple[str, ...]]:
    by_fault: dict[Fault, list[tuple[Outcome, bool]]] = {}
    for report in reports:
        for outcome in report.outcomes:
            by_fault.setdefault(outcome.fault, []).append((outcome, report.nothing_lost))
    for fault in Fault:
        if found := by_fault.get(fault):
            outcomes = [outcome for outcome, _ in found]
            seconds = [outcome.seconds for outcome in outcomes]
            yield (
                fault,
                str(len(found)),
                str(sum(kept for _, kept in found)),
                str(max(outcome.repeated for outcome in outcomes)),
                f"{median(seconds):.1f}",
                f"{max(seconds):.1f}",
            )

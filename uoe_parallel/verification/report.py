"""What a verification says: a table that grows row by row, and the same as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from uoe_parallel.verification.compare import INITIAL_WEIGHTS, QUANTITIES, Beyond, Comparison
from uoe_parallel.verification.ranks import Failure
from uoe_parallel.verification.record import RoutesSeen
from uoe_parallel.verification.request import PlantedFault, Tolerances

_NAMES_SHOWN = 6
_NUMBER = 10
"""Columns of a number."""
_HEADINGS = (*("loss", "grad norm", "gradients", "weights"), "routes", "seconds")
_SINGULAR = {"gradients": "gradient", "weights": "weight", INITIAL_WEIGHTS: "weight"}


@dataclass(frozen=True)
class Row:
    """The verdict on one run."""

    name: str
    outcome: Comparison | Failure
    beyond: list[Beyond] = field(default_factory=list)
    """What its tolerances do not allow, the first first."""
    routes: RoutesSeen | None = None
    seconds: float | None = None
    """From the start of its processes to their end; None for a run that was there before."""
    micro_batch_size: int | None = None
    fault: PlantedFault | None = None

    @property
    def passed(self) -> bool:
        return not isinstance(self.outcome, Failure) and not self.beyond

    @property
    def first(self) -> Beyond | None:
        """The first difference that is not allowed."""
        return next(iter(self.beyond), None)

    @property
    def first_parameter(self) -> Beyond | None:
        """The first that is a parameter's: its gradient or its weight."""
        return next((found for found in self.beyond if found.difference.parameter), None)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "layout": self.name,
            "passed": self.passed,
            "seconds": self.seconds,
            "micro_batch_size": self.micro_batch_size,
            "planted_fault": asdict(self.fault) if self.fault else None,
        }
        if isinstance(self.outcome, Failure):
            return found | {"failure": asdict(self.outcome)}
        return found | {
            "failure": None,
            "routes": asdict(self.routes) if self.routes else None,
            "largest": {name: asdict(self.outcome.worst(name)) for name in QUANTITIES},
            "first": asdict(self.first) if self.first else None,
            "first_parameter": asdict(self.first_parameter) if self.first_parameter else None,
            "initial_weights": self.outcome.initial,
            "steps": [asdict(step) for step in self.outcome.steps],
        }


def explain(row: Row) -> str:
    """Why a row did not pass."""
    if isinstance(row.outcome, Failure):
        return "\n".join(filter(None, [row.outcome.summary, row.outcome.details]))
    lines = [f"first: {_describe(row.beyond[0])}"]
    parameter = row.first_parameter
    if parameter is not None and parameter is not row.first:
        lines.append(f"first parameter: {_describe(parameter)}")
    routes = row.routes
    if routes and routes.flipped_tokens and not routes.replayed:
        lines.append(
            f"{routes.flipped_tokens} of {routes.tokens} tokens took another route; one near-tie "
            "of scores that flips exceeds any tolerance, so see what --routes replay says"
        )
    return "\n".join(lines)


def _describe(beyond: Beyond) -> str:
    """Such as "the loss in step 1 differs by 1.0e-02, allowed are 1.0e-05"."""
    found = beyond.difference
    what = f"the {found.quantity.replace('_', ' ')}"
    if found.parameter:
        what = f"the {_SINGULAR[found.quantity]} of {found.parameter}"
    when = f"in step {found.step}" if found.step else "before the first step"
    others = f" ({beyond.count} of {beyond.of} parameters are beyond it there)"
    return f"{what} {when} differs by {found.value:.1e}, allowed are {beyond.tolerance:.1e}" + (
        others if found.parameter else ""
    )


class Report:
    """Rows go to standard output as they come; what is being done, to standard error."""

    def __init__(
        self, names: Sequence[str], tolerances: Tolerances, *, plants: bool = False
    ) -> None:
        """`plants`: whether runs have faults planted."""
        self.rows: list[Row] = []
        self._plants = plants
        self._tolerances = tolerances
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._first_column = max(map(len, [*names, "passes up to"]))

    def say(self, message: str, style: str = "") -> None:
        self._out.print(Text(message, style), soft_wrap=True)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While something takes its time."""
        if self._err.is_terminal:
            with self._err.status(Text(what)):
                yield
        else:
            self._err.print(Text(what), soft_wrap=True)
            yield

    def head(self) -> None:
        self.say(self._line("layout", _HEADINGS), "bold")
        limits = [f"{getattr(self._tolerances, name):.1e}" for name in QUANTITIES]
        self.say(self._line("passes up to", [*limits, "", ""]), "dim")

    def reference(self, name: str, seconds: float) -> None:
        self.say(self._line(name, [*[""] * 5, f"{seconds:.1f}"]) + "  reference")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        cells = [""] * 4
        if isinstance(row.outcome, Comparison):
            cells = [f"{row.outcome.worst(name).value:.1e}" for name in QUANTITIES]
        flipped = str(row.routes.flipped_tokens) if row.routes else ""
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        line = Text(self._line(row.name, [*cells, flipped, seconds]) + "  ")
        line.append("pass" if row.passed else "FAIL", "green" if row.passed else "bold red")
        self._out.print(line, soft_wrap=True)
        if row.fault:
            self.say(f"  planted: {row.fault.what}")
        elif self._plants and not isinstance(row.outcome, Failure):
            self.say("  planted: nothing, this layout has no such reduction")
        if not row.passed:
            self.say("\n".join(f"  {part}" for part in explain(row).splitlines()))

    def left_out(self, reasons: Mapping[str, Sequence[str]]) -> None:
        if not reasons:
            return
        self.say("\nCan't run here:")
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            self.say(f"  {', '.join(names[:_NAMES_SHOWN])}{more}\n    {reason}")

    def conclude(self, seconds: float, results: Path) -> None:
        failed = sum(not row.passed for row in self.rows)
        count = len(self.rows)
        verdict = f"{failed} of {count} layouts FAIL" if failed else f"all {count} layouts pass"
        self.say(f"\n{verdict}, in {seconds:.0f} s; results in {results}", "bold")

    @property
    def passed(self) -> bool:
        """Whether everything so far has."""
        return all(row.passed for row in self.rows)

    def _line(self, name: str, cells: Sequence[str]) -> str:
        cells = [f"{cell:>{_NUMBER}}" for cell in cells]
        return "".join([f"{name:{self._first_column}}", *cells]).rstrip()


def _console(stream: Any) -> Console:
    # Without a terminal there are no control codes, whatever the environment says.
    return Console(file=stream, force_terminal=stream.isatty(), highlight=False)

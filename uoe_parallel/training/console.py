"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from uoe_parallel.training.metrics import Values

ETA_REPORTS = 16
"""Reports over which the speed is averaged for the ETA: smooth, yet soon past a slow start."""
LOG_FILE_WIDTH = 200
"""Columns a table may use where there is no terminal to fit."""


class _Column(NamedTuple):
    """A value that is shown: its name in the reported values, its label and its format."""

    name: str
    label: str
    format: str
    on_bar: bool = False


_COLUMNS = (
    _Column("loss", "loss", "8.4f", on_bar=True),
    _Column("distillation/divergence", "divergence", "8.4f"),
    _Column("bits_per_byte", "bits/byte", "8.4f"),
    _Column("perplexity", "perplexity", "8.2f"),
    _Column("gradient_norm", "grad norm", "9.3g"),
    _Column("learning_rate", "lr", "8.2e"),
    _Column("tokens_per_second", "tokens/s", "11,.0f", on_bar=True),
    _Column("load_max_over_mean", "max load", "6.2f"),
)


class TrainingConsole:
    """Speaks for the run on standard output.

    Ranks other than 0 hold one with quiet=True, which prints nothing. Every line is flushed, and
    without a terminal there are no control codes, whatever the environment says.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream` defaults to sys.stdout and `terminal` to what `stream` is."""
        file: TextIO = sys.stdout if stream is None else stream
        if terminal is None:
            # Rich heeds TTY_COMPATIBLE=0, which denies the terminals that mpirun gives to ranks.
            terminal = file.isatty() and Console(file=file).is_terminal
        self._console = Console(
            file=file,
            quiet=quiet,
            force_terminal=terminal,
            highlight=False,
            width=None if terminal else LOG_FILE_WIDTH,
        )
        self._clock = clock
        self._steps = 0
        self._seen: deque[tuple[int, float]] = deque(maxlen=ETA_REPORTS + 1)
        self._bar: tuple[Progress, TaskID] | None = None

    def say(self, message: str) -> None:
        """Print `message` as it is, above the bar if there is one."""
        self._console.out(message)

    def table(self, title: str, rows: Iterable[Sequence[str]]) -> None:
        """Print `rows` of equally many cells, in aligned columns below `title`."""
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    @contextmanager
    def progress(self, steps: int, start: int = 0) -> Iterator[None]:
        """The stretch of the program that trains, from `start` finished steps to `steps`."""
        self._steps = steps
        self._seen.clear()
        self._seen.append((start, self._clock()))
        if not self._console.is_interactive or self._console.quiet:
            yield
            return
        bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            expand=True,
        )
        with bar:
            self._bar = bar, bar.add_task("", total=steps, completed=start, status="")
            try:
                yield
            finally:
                self._bar = None

    def report(self, step: int, values: Values) -> None:
        """Show `values` after `step` finished steps, inside `progress`.

        Known names are loss, distillation/divergence, bits_per_byte, gradient_norm, learning_rate,
        tokens_per_second and load_max_over_mean. Those missing are left out, other names are not
        shown.
        """
        assert self._seen, "report() belongs inside progress()"
        eta = self._eta(step)
        if self._bar is not None:
            bar, task = self._bar
            cells = _cells(values, [column for column in _COLUMNS if column.on_bar])
            unpadded = [" ".join(cell.split()) for cell in cells]
            bar.update(task, completed=step, status="  ".join([*unpadded, f"ETA {eta}"]))
            return
        count = f"step {step:>{len(str(self._steps))}}/{self._steps}"
        self.say("  ".join([count, *_cells(values, _COLUMNS), f"ETA {eta:>8}"]))

    def _eta(self, step: int) -> str:
        """Time left as h:mm:ss, at the average speed of the last reports."""
        self._seen.append((step, self._clock()))
        (first_step, first_time), (last_step, last_time) = self._seen[0], self._seen[-1]
        if last_step <= first_step:
            return "-"
        rate = (last_time - first_time) / (last_step - first_step)
        minutes, seconds = divmod(round(rate * max(self._steps - step, 0)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _cells(values: Values, columns: Iterable[_Column]) -> list[str]:
    return [
        f"{column.label} {values[column.name]:{column.format}}"
        for column in columns
        if column.name in values
    ]

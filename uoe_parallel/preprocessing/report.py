"""What a person sees of the making of a corpus."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from uoe_parallel.preprocessing.parts import Counts
from uoe_parallel.preprocessing.session import BAD_LINES, Corpus

_LOG_FILE_WIDTH = 160
"""Columns a table may use where there is no terminal to fit."""
_SECONDS_PER_LINE = 10.0
"""Where there is no terminal."""


class Screen:
    """Speaks on standard output: a progress bar on a terminal, plain lines anywhere else."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._console = Console(
            force_terminal=terminal, highlight=False, width=None if terminal else _LOG_FILE_WIDTH
        )

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """As `session.Display` has it."""
        if not self._console.is_terminal:
            yield _plain_lines(name, total)
            return
        bar = Progress(
            TextColumn(name),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        with bar:
            task = bar.add_task("", total=total)
            yield lambda size: bar.advance(task, size)

    def conclude(self, corpus: Corpus, seconds: float, shown_bad_lines: int) -> None:
        """Tables of what was made, and the first of the lines that were left out."""
        table = Table(title="Sources", title_justify="left", box=None, pad_edge=False)
        table.add_column("source", overflow="fold")
        for heading in ("files", "documents", "tokens", "text bytes", "tokens/byte", "bad lines"):
            table.add_column(heading, justify="right")
        for source in corpus.sources:
            table.add_row(Text(source.source), f"{source.files:,}", *_cells(source.counts))
        if len(corpus.sources) > 1:
            files = sum(source.files for source in corpus.sources)
            table.add_row("all", f"{files:,}", *_cells(corpus.counts))
        self._console.print(table)
        self._console.print()
        made = Table(
            title="Corpus", title_justify="left", box=None, show_header=False, pad_edge=False
        )
        for name, value in self._facts(corpus, seconds):
            made.add_row(name, Text(value))
        self._console.print(made)
        if corpus.counts.bad_lines:
            self._console.print()
            self._show_bad_lines(corpus, shown_bad_lines)

    def _facts(self, corpus: Corpus, seconds: float) -> Iterator[tuple[str, str]]:
        tokenizer, sha256 = corpus.record["tokenizer"], corpus.record["sha256"]
        yield "prefix", str(corpus.prefix)
        yield "tokens", f"{corpus.counts.tokens:,}, {corpus.record['dtype']}"
        yield "tokenizer", f"{tokenizer['name']} ({tokenizer['fingerprint']})"
        yield "sha256 of .bin", sha256["bin"]
        yield "sha256 of .idx", sha256["idx"]
        reused = f", {corpus.parts_reused} of them made by an earlier run" * (
            corpus.parts_reused > 0
        )
        yield "parts", f"{corpus.parts}{reused}"
        yield (
            "time",
            f"{seconds:,.1f} s, {corpus.counts.text_bytes / seconds / 1e6:,.1f} MB of text/s",
        )

    def _show_bad_lines(self, corpus: Corpus, most: int) -> None:
        path = Path(f"{corpus.prefix}{BAD_LINES}")
        self._console.out(f"{corpus.counts.bad_lines:,} bad lines are left out; {path} lists them")
        with path.open(encoding="utf-8") as lines:
            for line in itertools.islice(lines, most):
                self._console.out(f"  {line.rstrip()}")


def _cells(counts: Counts) -> tuple[str, ...]:
    ratio = f"{counts.tokens / counts.text_bytes:.4f}" if counts.text_bytes else "-"
    return (
        f"{counts.documents:,}",
        f"{counts.tokens:,}",
        f"{counts.text_bytes:,}",
        ratio,
        f"{counts.bad_lines:,}",
    )


def _plain_lines(name: str, total: int) -> Callable[[int], None]:
    """Prints a line now and then."""
    done, last = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, last
        done += size
        if time.monotonic() - last >= _SECONDS_PER_LINE:
            last = time.monotonic()
            print(f"{name}: {done:,} of {total:,} bytes, {done / total:.0%}", flush=True)

    return advance

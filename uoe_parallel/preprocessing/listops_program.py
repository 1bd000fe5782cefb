"""Make the ListOps task: `python tools/make_listops.py`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.preprocessing.listops import END, OPERATORS, Recipe
from uoe_parallel.preprocessing.listops_corpus import Drawn, Statistics, make_corpora

_LEAST = {
    "min_length": 0,
    "max_length": 2,
    "max_depth": 1,
    "max_args": 2,
    "train": 1,
    "validation": 1,
    "test": 1,
    "seed": 0,
}
_LOG_FILE_WIDTH = 160
"""Columns a table may use where there is no terminal to fit."""
_MOST = 2**30
"""Of any of them; expressions are held in memory whole."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_listops.py",
        description="Makes the ListOps task of the Long Range Arena by its published recipe: "
        "nested operations on lists of digits as documents, and their values as ten classes. "
        "Writes OUTPUT/train, validation and test, each a .bin/.idx pair with .labels.npy, and "
        "OUTPUT/summary.json.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where the corpora go"
    )

    def number(option: str, default: int, meaning: str) -> None:
        meaning = f"{meaning} (default: %(default)s)"
        parser.add_argument(option, type=int, default=default, metavar="N", help=meaning)

    recipe = Recipe()
    number("--min-length", recipe.min_length, "expressions have more tokens than this")
    number("--max-length", recipe.max_length, "expressions have fewer tokens than this")
    number("--max-depth", recipe.max_depth, "levels of a tree at most; digits count as one")
    number("--max-args", recipe.max_args, "arguments of an operator at most")
    for split, examples in (("train", 96000), ("validation", 2000), ("test", 2000)):
        number(f"--{split}", examples, f"expressions for {split}")
    number("--seed", 1234, "chooses the expressions")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 for a mistake that the user can mend."""
    options = parse_arguments(arguments)
    width = None if sys.stdout.isatty() else _LOG_FILE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    try:
        _make(options, console)
    except UserError as error:
        print(f"make_listops.py: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    return 0


def _make(options: argparse.Namespace, console: Console) -> None:
    _check(options)
    recipe = Recipe(options.min_length, options.max_length, options.max_depth, options.max_args)
    examples = {split: getattr(options, split) for split in ("train", "validation", "test")}
    started = time.monotonic()
    with Progress(
        "drawing",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=sum(examples.values()))
        statistics, drawn = make_corpora(
            options.output, recipe, examples, options.seed, lambda: progress.advance(task)
        )
    _conclude(console, options.output, statistics, drawn, time.monotonic() - started)


def _check(options: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value < least:
            raise UserError(f"{option} {value} is below {least}; use {least} or more")
        if value > _MOST:
            raise UserError(f"{option} {value} is above {_MOST}; use {_MOST} or less")
    if options.max_length - options.min_length < 2:
        raise UserError(
            f"--min-length {options.min_length} --max-length {options.max_length}: no length lies "
            f"between them; use --max-length {options.min_length + 2} or more"
        )


def _conclude(
    console: Console,
    folder: Path,
    statistics: Mapping[str, Statistics],
    drawn: Drawn,
    seconds: float,
) -> None:
    values = {split: found.classes for split, found in statistics.items()}
    depths = {split: found.depths for split, found in statistics.items()}
    for table in (
        _splits(folder, statistics),
        _shares("Expressions by value", "class", values),
        _shares("Expressions by depth", "levels", depths),
    ):
        console.print(table)
        console.print()
    letters = ", ".join(f"{symbol} {name}" for name, symbol in OPERATORS.items())
    console.print(
        "most frequent: the class, and how often it is; by first token: how often the guess is "
        "right that is best for an expression's outermost operator"
    )
    console.print(f"tokens: bytes, {letters}, {END} where an operator's arguments end")
    console.print(
        f"{drawn.trees:,} trees drawn, {drawn.repeated:,} left out for being repeated; "
        f"{seconds:.1f} s"
    )


def _splits(folder: Path, statistics: Mapping[str, Statistics]) -> Table:
    heads = ["", "examples", "tokens", "shortest", "median", "longest"]
    heads += ["most frequent", "by first token"]
    rows = [
        (
            split,
            f"{found.examples:,}",
            f"{found.tokens:,}",
            *(str(found.length_at(share)) for share in (0, 0.5, 1)),
            "{}: {:.2%}".format(*found.most_frequent),
            f"{found.first_token_share:.2%}",
        )
        for split, found in statistics.items()
    ]
    return _table(str(folder), heads, rows)


def _shares(title: str, kind: str, counts: Mapping[str, Counter[int]]) -> Table:
    """What percentage of each split is of each kind."""
    rows = (
        (str(number), *(f"{count[number] / count.total():.2%}" for count in counts.values()))
        for number in sorted(set().union(*counts.values()))
    )
    return _table(title, [kind, *counts], rows)


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table

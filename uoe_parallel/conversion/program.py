"""The program behind tools/convert_checkpoint.py: one subcommand for each way.

A module with subcommands has a function `add_arguments(commands)`, which adds a parser for each of
them to argparse's subparsers and names what the subcommand does:

    parser = commands.add_parser("merge", help="...")
    parser.add_argument(...)
    parser.set_defaults(run=merge)

`run` gets the parsed options and returns nothing. It raises UserError for mistakes; the program
prints those and turns them into exit code 2. Heavy imports belong inside `run`, so that --help and
wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from uoe_parallel.conversion import export_program, import_program
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError

Commands = Any
"""argparse's subparsers, whose type is private to it."""

SUBCOMMANDS: tuple[Callable[[Commands], None], ...] = (
    import_program.add_arguments,
    export_program.add_arguments,
)

INTERRUPTED = 130
"""Exit code, beside 0 and that of a mistake."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Turns models of Hugging Face's transformers into checkpoints of a Union of "
        "Experts, and such checkpoints into models that transformers loads.",
        epilog="COMMAND --help tells each one's arguments; docs/conversion.md explains them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_arguments in SUBCOMMANDS:
        add_arguments(commands)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one place only, and intermixes them with options only where there
    # are no subcommands.
    if not hasattr(options, "overrides") or any(text.startswith("-") for text in rest):
        parser.parse_args(arguments)
    else:
        options.overrides += rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0

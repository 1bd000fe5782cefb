"""The subcommands that take a checkpoint out of the project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add `merge` and `export` to argparse's subparsers; see `program`."""
    merge_parser = commands.add_parser(
        "merge",
        help="a checkpoint back to the dense GPT-2 or Llama model with all experts on",
    )
    _add_places(merge_parser)
    merge_parser.set_defaults(run=merge)
    export_parser = commands.add_parser(
        "export",
        help="a checkpoint with its routing, for transformers with trust_remote_code=True",
    )
    _add_places(export_parser)
    export_parser.set_defaults(run=export)


def merge(options: argparse.Namespace) -> None:
    """Raises UserError."""


def export(options: argparse.Namespace) -> None:
    """Raises UserError."""


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder for its newest checkpoint, or one of it"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the model")

"""The subcommands that bring a checkpoint to transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_parallel.conversion.export_folder import Exported

_PRECISIONS = ("fp32", "bf16", "fp64")


def add_arguments(commands: Any) -> None:
    """Add `merge` and `export` to argparse's subparsers; see `program`."""
    _add(
        commands,
        "merge",
        _merge,
        "a checkpoint to the dense GPT-2 or Llama model that has all of its experts on",
    )
    _add(
        commands,
        "export",
        _export,
        "a checkpoint with its routing, for transformers with trust_remote_code=True",
    )


def _add(commands: Any, name: str, run: Any, text: str) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="for its newest checkpoint, or one of these"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the model")
    parser.add_argument(
        "--precision", choices=_PRECISIONS, help="of the weights (default: that of the run)"
    )
    parser.set_defaults(run=run)


def _merge(options: argparse.Namespace) -> None:
    from uoe_parallel.conversion.export_dense import merge

    _tell(options, merge(options.run_folder, options.out, options.precision))


def _export(options: argparse.Namespace) -> None:
    from uoe_parallel.conversion.export_uoe import export

    _tell(options, export(options.run_folder, options.out, options.precision))


def _tell(options: argparse.Namespace, written: Exported) -> None:
    print(
        f"{options.out}: step {written.step}, {written.elements:,} numbers, "
        f"{written.bytes / 1e6:,.1f} MB in {written.files} file(s) of weights"
    )
    if not written.has_tokenizer:
        print("the SentencePiece model beside it is not one that AutoTokenizer finds by itself")

"""Learn a tokenizer from text: `python tools/train_tokenizer.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.preprocessing.bpe import SMALLEST_VOCABULARY, refuse_existing, save_new, train_bpe
from uoe_parallel.preprocessing.sources import read_texts
from uoe_parallel.preprocessing.spans import FORMATS, Reading

_SAMPLE_BYTES = 2**20
"""Text that is encoded at the end to tell how long tokens are."""
_SHOWN_BAD_LINES = 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer",
        description="Learns a byte-level BPE from documents and writes a Hugging Face tokenizers "
        "file. The same documents give the same file. Reading a part of a large corpus is enough: "
        "every different word is held in memory.",
    )
    parser.add_argument("sources", nargs="+", help="files, folders and patterns of documents")
    parser.add_argument("--out", type=Path, required=True, help="the .json file to write")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32768,
        help="ids at most, with those of the 256 bytes and of the end of documents "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--min-frequency",
        type=int,
        default=2,
        help="how often a pair must occur to become a token (default: %(default)s)",
    )
    parser.add_argument("--format", choices=FORMATS, help="of all files; by their endings if not")
    parser.add_argument(
        "--field",
        default="text",
        help="of JSON objects, or the column of tables, that has the text (default: %(default)s)",
    )
    parser.add_argument(
        "--separator", help="the line between documents of a text file; else each is one document"
    )
    parser.add_argument(
        "--bad-lines",
        choices=["stop", "skip"],
        default="stop",
        help="what to do about lines that hold no document (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 for a mistake that the user can mend."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, markup=False)
    try:
        _learn(options, console)
    except UserError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    return 0


@dataclass
class _Told:
    """What went by while documents were read."""

    documents: int = 0
    bytes: int = 0
    bad_lines: list[str] = field(default_factory=list)
    """The first of them."""
    num_bad: int = 0
    sample: list[str] = field(default_factory=list)
    """The first documents, up to about `_SAMPLE_BYTES`."""

    def note(self, text: str) -> None:
        size = len(text.encode())
        if self.bytes < _SAMPLE_BYTES:
            self.sample.append(text[:_SAMPLE_BYTES])
        self.documents += 1
        self.bytes += size

    def skip(self, bad_line: str) -> None:
        self.num_bad += 1
        if self.num_bad <= _SHOWN_BAD_LINES:
            self.bad_lines.append(bad_line)


def _learn(options: argparse.Namespace, console: Console) -> None:
    _check(options)
    reading = Reading(options.format, options.field, options.separator)
    told = _Told()
    on_bad = _stop if options.bad_lines == "stop" else told.skip
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("reading")

        def texts() -> Iterator[str]:
            for text in read_texts(options.sources, reading, on_bad):
                told.note(text)
                read = f"reading: {told.documents:,} documents, {told.bytes / 2**20:,.1f} MiB"
                progress.update(task, description=read)
                yield text
            progress.update(task, description="learning")

        tokenizer = train_bpe(texts(), options.vocab_size, options.min_frequency)
    if told.documents == 0:
        raise UserError(f"{', '.join(options.sources)}: no document to learn from; name others")
    save_new(tokenizer, options.out)
    for bad_line in told.bad_lines:
        console.out(f"left out: {bad_line}")
    console.print(_result(options, told))


def _check(options: argparse.Namespace) -> None:
    """Before text is read for hours."""
    if options.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size {options.vocab_size} does not hold the 256 bytes and the end of "
            f"documents; use {SMALLEST_VOCABULARY} or more"
        )
    if options.min_frequency < 1:
        raise UserError(f"--min-frequency {options.min_frequency} is below 1; use 1 or more")
    if options.out.suffix != ".json":
        raise UserError(f"--out {options.out}: data.tokenizer knows it by its ending; use .json")
    refuse_existing(options.out)


def _stop(bad_line: str) -> NoReturn:
    raise UserError(f"{bad_line}; mend the line or leave such lines out with --bad-lines skip")


def _result(options: argparse.Namespace, told: _Told) -> Table:
    tokenizer = build_tokenizer(str(options.out))
    sample_bytes = sum(len(text.encode()) for text in told.sample)
    sample_tokens = sum(len(tokenizer.encode(text)) for text in told.sample)
    rows = {
        "documents": f"{told.documents:,}",
        "bytes of text": f"{told.bytes:,}",
        "bad lines": f"{told.num_bad:,} left out",
        "ids": f"{tokenizer.size:,} of {options.vocab_size:,}",
        "bytes per token": f"{sample_bytes / sample_tokens:.2f} of the first {sample_bytes:,} "
        "bytes",
        "fingerprint": tokenizer.fingerprint,
    }
    table = Table(title=str(options.out), title_justify="left", box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table

"""The program behind tools/preprocess_data.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.preprocessing.report import Screen
from uoe_parallel.preprocessing.session import Request, preprocess
from uoe_parallel.preprocessing.spans import FORMATS, Reading

_INTERRUPTED = 130

_DESCRIPTION = """\
Make a corpus to train on out of text: PREFIX.bin and PREFIX.idx, in Megatron's format, and
PREFIX.json, which says what is in them. Every document ends with the tokenizer's end-of-document
token. Repeat the command to go on after it was ended: what is finished is kept in PREFIX.parts.
"""
_EPILOG = """\
examples:
  python tools/preprocess_data.py corpus/*.jsonl.gz --output data/train --tokenizer tokenizer.json
  python tools/preprocess_data.py stories.txt --separator '<|endoftext|>' --output data/stories
  python tools/preprocess_data.py 'src/**/*.py' --format text --output data/code
  python tools/preprocess_data.py saved_dataset/train --field content --output data/train

Exit codes: 0 made; 2 a mistake in the command, or a source that cannot be used; 130 interrupted.
"""


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The sources, and what `reading_of` reads."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file, a folder, a pattern in quotes, or a folder that datasets' save_to_disk "
        "wrote; .jsonl, .ndjson, .json and .txt may have .gz or .zst after them",
    )
    parser.add_argument(
        "--format",
        choices=[form for form in FORMATS if form != "datasets"],
        help="of all files, whatever their endings (default: by the ending of each)",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="field of a JSON line, or column of a table, that has the text (default: %(default)s)",
    )
    parser.add_argument(
        "--separator",
        metavar="LINE",
        help="the line between two documents of a text file; '' for empty lines (default: a text "
        "file is one document)",
    )


def reading_of(options: argparse.Namespace) -> Reading:
    """How to read the sources. Raises UserError."""
    if options.separator is not None and "\n" in options.separator:
        raise UserError(f"--separator {options.separator!r}: is more than a line; name one line")
    return Reading(options.format, options.field, options.separator)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="path without .bin and .idx"
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, or the path of a tokenizer: as data.tokenizer has it (default: %(default)s)",
    )
    parser.add_argument(
        "--bad-lines",
        choices=["stop", "skip"],
        default="stop",
        help="what to do about lines without a document, such as bad JSON, no text or invalid "
        "UTF-8: stop at the first (default), or leave them out and list them in "
        "PREFIX.bad_lines.txt",
    )
    parser.add_argument(
        "--show-bad-lines",
        type=int,
        default=10,
        metavar="N",
        help="at the end, of those left out (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_positive(int),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; the result does not depend on them (default: one for each CPU, "
        "here %(default)s)",
    )
    parser.add_argument(
        "--part-megabytes",
        type=_positive(float),
        default=32.0,
        metavar="MB",
        help="how much of the sources a worker takes at a time, and so loses when it is ended "
        "(default: %(default)g)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    screen, start = Screen(), time.monotonic()
    try:
        request = Request(
            arguments=options.sources,
            prefix=options.output,
            tokenizer=options.tokenizer,
            reading=reading_of(options),
            bad_lines=options.bad_lines,
            workers=options.workers,
            part_bytes=max(1, round(options.part_megabytes * 1e6)),
        )
        corpus = preprocess(request, screen)
    except UserError as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted; repeat the command to go on", file=sys.stderr)
        return _INTERRUPTED
    screen.conclude(corpus, time.monotonic() - start, options.show_bad_lines)
    return 0


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return number

    # Argparse names it when the text is no number.
    parse.__name__ = kind.__name__
    return parse

"""The program behind tools/evaluate.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uoe_parallel.config.json_text import write_json
from uoe_parallel.inference.program import (
    add_model_arguments,
    console,
    progress_bar,
    read_texts,
    run_program,
)
from uoe_parallel.parallel.agreement import shared_fate

if TYPE_CHECKING:
    from uoe_parallel.inference.evaluation import TextScore

_DESCRIPTION = """\
Perplexity per token, bits per byte and perplexity per word of texts, each read as one document in
windows that overlap. Every token counts once.
"""
_EPILOG = """\
examples:
  python tools/evaluate.py runs/mine book.txt
  torchrun --standalone --nproc-per-node 2 tools/evaluate.py runs/mine book.txt parallel.tensor=2

Exit codes: 0; 2 a mistake in the command, the run or a file.
"""
_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=.*", re.DOTALL)
_COLUMNS = {
    "tokens": ",",
    "bytes": ",",
    "words": ",",
    "loss": ".4f",
    "perplexity": ".6g",
    "bits_per_byte": ".4f",
    "word_perplexity": ".6g",
}
"""What the table has of each text, and how it is written."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="UTF-8 files, - for standard input; what looks like section.field=value replaces a "
        "field of the run's config instead, such as parallel.tensor=2",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="read at once (default: model.sequence_length)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="from a window to the next: the fewer, the more context each token has, at more cost "
        "(default: half a window)",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="windows at once (default: the run's micro-batch)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [text for text in options.texts if _OVERRIDE.fullmatch(text)]
    options.texts = [text for text in options.texts if text not in options.overrides]
    if not options.texts:
        parser.error("name a TEXT")
    if options.batch is not None and options.batch < 1:
        parser.error("--batch: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    return run_program("evaluate.py", lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    from uoe_parallel.inference.evaluation import TextScore, evaluate_texts, reading_window
    from uoe_parallel.inference.opening import opened

    with opened(options.run, options.overrides) as model:
        group = model.groups.world
        target = console(quiet=not model.groups.is_main)
        texts = read_texts(options.texts, group)
        with progress_bar(target, "windows") as progress:
            scores = evaluate_texts(
                model,
                texts,
                window=options.window,
                stride=options.stride,
                batch_size=options.batch,
                all_experts=options.all_experts,
                progress=progress,
            )
        window, stride = reading_window(model, options.window, options.stride)
        total = TextScore.total(list(scores.values()))
        rows = [*scores.items(), *([("all", total)] if len(scores) > 1 else [])]
        reading = f"windows of {window} tokens, {stride} further each"
        _print(target, f"Step {model.step}, {reading}", rows)
        with shared_fate("the results cannot be written", "See to --json", group):
            if options.json is not None and model.groups.is_main:
                content = {
                    "run": str(options.run),
                    "step": model.step,
                    "window": window,
                    "stride": stride,
                    "all_experts": options.all_experts,
                    "texts": {name: score.values for name, score in scores.items()},
                    "all": total.values,
                }
                write_json(options.json, content)


def _print(target: Console, title: str, rows: Iterable[tuple[str, TextScore]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("text", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for name, score in rows:
        values = score.values
        table.add_row(Text(name), *(f"{values[key]:{form}}" for key, form in _COLUMNS.items()))
    target.print(table)

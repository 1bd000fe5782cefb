"""What the programs of this package share: how they read, speak and end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed import ProcessGroup

from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.parallel.agreement import broadcast_json, shared_fate
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import rank_from_environment

INTERRUPTED = 130
STDIN = "-"
_LOG_FILE_WIDTH = 160
"""Columns that tables may use where there is no terminal to fit."""


def run_program(name: str, work: Callable[[], None]) -> int:
    """The exit code of `work`, which every rank does and which imports what it needs: 0, or 2 for a
    user's mistake, which rank 0 tells."""
    use_device(0)  # before DeepSpeed is imported, which picks its accelerator then
    try:
        work()
    except UserError as error:
        if rank_from_environment() == 0:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what is common to programs that open one."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder, for its newest checkpoint, or one"
    )
    parser.add_argument(
        "--all-experts",
        action="store_true",
        help="every token visits every expert, with gates of one: the dense model",
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def read_texts(paths: Sequence[str], group: ProcessGroup) -> dict[str, str]:
    """UTF-8 text by path, "-" for standard input, read by rank 0 for all. Collective over `group`;
    raises UserError on every rank."""
    texts: dict[str, str] = {}
    with shared_fate("the text cannot be read", "See to the named file", group):
        if group.rank() == 0:
            texts = {path: _read(path) for path in paths}
    return broadcast_json(texts, group)


def _read(path: str) -> str:
    content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it first"
        ) from None


def console(*, quiet: bool) -> Console:
    """Standard output, without control codes where that is no terminal. Ranks other than 0 are
    quiet."""
    terminal = sys.stdout.isatty()
    width = None if terminal else _LOG_FILE_WIDTH
    return Console(
        file=sys.stdout, quiet=quiet, force_terminal=terminal, highlight=False, width=width
    )


@contextmanager
def progress_bar(target: Console, label: str) -> Iterator[Callable[[int], Callable[[int], object]]]:
    """A bar on a terminal, nothing elsewhere: what is given is told the total, and what that
    returns how much more is done."""
    bar = Progress(
        TextColumn(label),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        console=target,
        expand=True,
        transient=True,
        disable=target.quiet or not target.is_interactive,
    )

    def begin(total: int) -> Callable[[int], object]:
        task = bar.add_task("", total=total)
        return lambda done: bar.advance(task, done)

    with bar:
        yield begin

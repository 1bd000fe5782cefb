"""Hurt a real job in every way that it has to survive: `python tools/soak.py`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.soak.job import Lost
from uoe_parallel.soak.schedule import Fault
from uoe_parallel.soak.session import soak


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(fault.name.lower() for fault in Fault)
    parser = argparse.ArgumentParser(
        prog="soak",
        description="Trains under torchrun, injects faults at random, and holds what comes out "
        "against runs without faults. Exit code 0: nothing was lost, 1: something was, or no fault "
        "came.",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        help="no fault comes later; the run that goes on then still ends (default: %(default)g)",
    )
    parser.add_argument("--rounds", type=int, help="runs at most; as many as there is time if not")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random")
    parser.add_argument("--ranks", type=int, default=2, help="local ones (default: %(default)s)")
    parser.add_argument(
        "--config",
        type=Path,
        help="another run than the small one; its length, checkpoints and reports are the soak's",
    )
    parser.add_argument(
        "--faults",
        type=_faults,
        default=list(Fault),
        help=f"some of: {names}",
    )
    parser.add_argument("--folder", type=Path, help="an empty one, kept; a temporary one if not")
    parser.add_argument("--json", type=Path, help="a file for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 1 if anything was lost or nothing injected, or
    2."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    # Whoever ends the soak leaves no job behind.
    signal.signal(signal.SIGTERM, _leave)
    with ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        try:
            _make_empty(folder)
            _try_to_write(options.json)
            reports = soak(
                folder.absolute(),
                options.config,
                seconds=options.seconds,
                most_rounds=options.rounds,
                seed=options.seed,
                ranks=options.ranks,
                faults=options.faults,
                say=lambda text: print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True),
            )
        except UserError as error:
            print(f"soak: {error}", file=sys.stderr, flush=True)
            return USER_ERROR_EXIT_CODE
        except Lost as lost:
            print(f"soak: {lost}", file=sys.stderr, flush=True)
            return 1
    seconds = time.monotonic() - start
    # With Megatron and DeepSpeed behind it, which a soak needs in its ranks alone.
    from uoe_parallel.soak.report import print_report, write_json

    print_report(reports, options.seed, seconds)
    if options.json is not None:
        write_json(reports, options.seed, seconds, options.json)
    was_hurt = any(report.outcomes for report in reports)
    return 0 if was_hurt and all(report.nothing_lost for report in reports) else 1


def _make_empty(folder: Path) -> None:
    """Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}; name one to write to") from error
    if not is_empty:
        raise UserError(f"--folder {folder} is not empty: name another one")


def _faults(text: str) -> list[Fault]:
    known = {fault.name.lower(): fault for fault in Fault}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(unknown)}")
    return [known[name] for name in names]


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _try_to_write(file: Path | None) -> None:
    """Raises UserError: minutes before there is anything to write."""
    try:
        if file is not None:
            file.touch()
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}; name a file to write to") from error

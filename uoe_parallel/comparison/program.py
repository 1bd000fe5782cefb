"""Compare Union-of-Experts models with others: `python tools/compare_quality.py`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import get_args

from uoe_parallel.analysis.report import plain_console
from uoe_parallel.comparison.report import print_report, write_report
from uoe_parallel.comparison.runs import Runner
from uoe_parallel.comparison.session import Session
from uoe_parallel.comparison.settings import Budget, load_comparison
from uoe_parallel.comparison.text import make_corpora
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_quality",
        description="Trains contenders on the same data in the same order under one budget, each "
        "with the best of the same learning rates, and reports how they differ. Ended, the same "
        "command goes on where it stopped.",
    )
    parser.add_argument("--config", type=Path, required=True, help="such as configs/compare/*.yaml")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each contender")
    parser.add_argument("--budget", choices=get_args(Budget), help="what all get as much of")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, on their share of the cores; times are less certain then "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="of the contenders: these alone, beside the first baseline",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="train on the bytes of these files, and judge by pieces of them that are held out, "
        "in place of what run.data names",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="what it will take; trains nothing")
    only.add_argument("--report", action="store_true", help="of what is done; trains nothing")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the YAML file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 for a mistake or a run that failed."""
    options = parse_arguments(arguments)
    # Whoever ends this leaves no run behind.
    signal.signal(signal.SIGTERM, _leave)
    try:
        comparison = load_comparison(options.config, _overrides(options))
        if options.only:
            comparison = comparison.only(options.only)
        if options.text:
            corpora = make_corpora(options.text, Path(comparison.folder))
            comparison = comparison.model_copy(update={"run": {**comparison.run, "data": corpora}})
        if options.jobs < 1:
            raise UserError(f"--jobs {options.jobs}: name how many runs train at once, 1 or more")
        trains = not (options.plan or options.report)
        runner = Runner(comparison.launch, options.jobs, _say) if trains else None
        session = Session(comparison, runner)
        if options.plan:
            plain_console().print(session.outlook())
            return 0
        results = session.results(options.jobs)
        if not results.results:
            raise UserError("no contender has all its runs yet; train first, without --report")
        print_report(results, plain_console())
        for path in write_report(results, Path(comparison.folder) / comparison.budget):
            _say(f"{path} is written")
    except UserError as error:
        print(f"compare_quality: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        _say("ended; the same command goes on from here")
        return 128 + signal.SIGINT
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    own = {"seeds": options.seeds, "budget": options.budget}
    return [*options.overrides, *(f"{k}={v}" for k, v in own.items() if v is not None)]


def _say(text: str) -> None:
    print(text, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

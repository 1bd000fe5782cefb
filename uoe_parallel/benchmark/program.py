"""The program behind tools/bench_layers.py."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from uoe_parallel.benchmark.report import say, section_text
from uoe_parallel.benchmark.sizes import Sizes, check_sizes
from uoe_parallel.benchmark.worker import Measured
from uoe_parallel.config.json_text import write_json
from uoe_parallel.errors import UserError
from uoe_parallel.verification.ranks import Failure, LocalRanks

FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130
"""Exit codes, beside 0."""
LIBRARIES = ("torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Section:
    """Something that is measured in processes of its own."""

    function: str
    """Such as "package.module:function", called with the session on every rank; what rank 0 returns
    counts, a list of entries."""
    ranks: tuple[int, ...] | None = None
    """On how many ranks, if these are asked for; None for any number."""


_FEED_FORWARD = "uoe_parallel.benchmark.feed_forward"
SECTIONS = {
    "feed_forward": Section(f"{_FEED_FORWARD}:measure"),
    "wide": Section(f"{_FEED_FORWARD}:measure_wide"),
    "narrow": Section(f"{_FEED_FORWARD}:measure_narrow"),
    "skew": Section("uoe_parallel.benchmark.skew:measure", (1,)),
    "attention": Section("uoe_parallel.benchmark.attention:measure", (1,)),
    "memory": Section("uoe_parallel.benchmark.memory:measure", (1,)),
    "traffic": Section("uoe_parallel.benchmark.traffic:measure", (2, 4)),
}

_EPILOG = """\
Contenders of a section run in turn in the same processes, forward and backward, on the same input;
a figure is the median over rounds, with the smallest and the largest. First it is checked that they
compute comparable work. Ranks have a thread for each core, shared evenly; OMP_NUM_THREADS changes
that. The output folder gets results.json and the plots that the sections are enough for. Exit
codes: 0 measured, 1 something failed or is not comparable, 2 a mistake in the command.
"""


class MeasurementError(Exception):
    """A section has no result."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_layers.py",
        description="Time this project's layers beside dense ones and those of other libraries.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Sizes()
    for option, what in {
        "tokens": "of all ranks together",
        "sequence": "tokens of a sequence",
        "hidden": "model width",
        "ffn": "feed-forward width of all experts together",
        "experts": "slices of the block",
        "top-k": "experts of a token",
    }.items():
        value = getattr(default, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}",
            type=_positive,
            default=value,
            metavar="N",
            help=f"{what} (default: {value})",
        )
    parser.add_argument(
        "--ranks",
        type=_positive,
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="numbers of ranks to measure on (default: 1 2 4)",
    )
    parser.add_argument(
        "--rounds", type=_positive, default=15, metavar="N", help="counted rounds (default: 15)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=1800,
        metavar="SECONDS",
        help="after which the ranks of a section are killed (default: 1800)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/bench_layers"),
        metavar="DIR",
        help="where results and plots go (default: runs/bench_layers)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        _run(options)
    except (UserError, MeasurementError) as error:
        print(f"bench_layers.py: {error}", file=sys.stderr, flush=True)
        return MISTAKEN if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt:
        print("bench_layers.py: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    sizes = Sizes(
        tokens=options.tokens,
        sequence=options.sequence,
        hidden=options.hidden,
        ffn=options.ffn,
        experts=options.experts,
        top_k=options.top_k,
    )
    planned = _plan(options.only, options.ranks)
    for _, ranks in planned:
        check_sizes(sizes, ranks)
    results: dict[str, Any] = {
        "sizes": asdict(sizes),
        "rounds": options.rounds,
        "machine": _machine(),
        "sections": [],
    }
    local = LocalRanks()
    for name, ranks in planned:
        print(f"{name} on {ranks} rank{'s' * (ranks > 1)} ...", file=sys.stderr, flush=True)
        measured = _measure(local, name, ranks, sizes, options)
        section = {"section": name, "ranks": ranks} | asdict(measured)
        results["sections"].append(section)
        say(section_text(section))
        # After each: what is measured stays measured.
        write_json(options.output / "results.json", results, option="--output")
    # Not before it is needed: it takes a second, and ranks do without.
    from uoe_parallel.benchmark.plots import plot

    written = [options.output / "results.json", *plot(results, options.output)]
    say("\n".join(map(str, written)))


def _plan(names: Sequence[str], asked: Sequence[int]) -> list[tuple[str, int]]:
    """Sections and numbers of ranks, in the order of the table."""
    planned = [
        (name, ranks)
        for name, section in SECTIONS.items()
        for ranks in sorted(set(asked))
        if name in names and (section.ranks is None or ranks in section.ranks)
    ]
    if not planned:
        possible = "; ".join(
            f"{name} runs on {', '.join(map(str, SECTIONS[name].ranks or ()))} ranks"
            for name in names
        )
        raise UserError(f"--ranks {' '.join(map(str, asked))}: nothing to measure; {possible}")
    return planned


def _measure(
    local: LocalRanks, name: str, ranks: int, sizes: Sizes, options: argparse.Namespace
) -> Measured:
    with tempfile.TemporaryDirectory(prefix="bench_layers-") as logs:
        outcome = local.run(
            ranks,
            "uoe_parallel.benchmark.worker:measure",
            SECTIONS[name].function,
            sizes,
            options.rounds,
            options.timeout,
            logs=Path(logs),
            timeout=options.timeout,
        )
    where = f"{name} on {ranks} rank{'s' * (ranks > 1)}"
    if isinstance(outcome, Failure):
        if outcome.mistake:
            raise UserError(f"{where}: {outcome.mistake}")
        raise MeasurementError(f"{where}: {outcome.summary}\n{outcome.details}")
    assert isinstance(outcome, Measured)
    if outcome.incomparable:
        raise MeasurementError(f"{where}: not comparable: {outcome.incomparable}")
    return outcome


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _positive(text: str) -> int:
    """A type for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive int"

"""The program behind tools/verify_layouts.py."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from uoe_parallel.config.json_text import write_json
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import Precision
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.device import use_device
from uoe_parallel.verification.compare import (
    DEFAULTS,
    EPS,
    QUANTITIES,
    compare,
    differing_fields,
)
from uoe_parallel.verification.record import RunRecord
from uoe_parallel.verification.report import Report, Row
from uoe_parallel.verification.request import (
    FaultKind,
    FaultRequest,
    Request,
    RoutesUse,
    Tolerances,
)
from uoe_parallel.verification.session import ReferenceFailedError, verify

DIFFERENT, MISTAKEN, INTERRUPTED = 1, 2, 130
"""Exit codes, beside 0 for a pass."""

_DESCRIPTION = """\
Show that layouts train the same model: run a config on one rank and on every other layout of local
ranks, and compare losses, gradients and weights after every step.
"""
_EPILOG = """\
examples:
  python tools/verify_layouts.py --config configs/cpu_quickstart.yaml --ranks 4 --shrink
  python tools/verify_layouts.py --config FILE --ranks 8 --layouts 'tp2-*' 'pp2-dp*-zero1'
  python tools/verify_layouts.py --compare runs/one_rank runs/on_the_cluster
  python tools/verify_layouts.py --config FILE --simulate-world 4096 --simulate-rank 17

A difference is |a - b| / max(own norm, eps x global norm) of b on one rank. Of a gradient the own
norm is that of the parameter's gradient in the step, before clipping; of a weight that of its
change since the first step. Exit codes: 0 all pass, 1 something differs or failed (the first
parameter that differs is named), 2 a mistake in the command, the config or the data.

To compare runs of a cluster, start each with any launcher and with training.steps=N
checkpoint.every=1 checkpoint.keep=N logging.every=1 and a run_dir of its own, then use --compare.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_layouts.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="the YAML of a run")
    what.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("REFERENCE", "RUN"),
        help="run nothing: compare the folders of two runs, however they were launched",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a field of the file; the value is YAML",
    )
    parser.add_argument(
        "--ranks", type=_positive(int), metavar="N", help="the most that a layout may have"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="names of layouts such as tp2-sp-dp2-zero1, or patterns such as 'tp2-*'; by default "
        "every layout of 2 to N ranks that can run",
    )
    parser.add_argument(
        "--steps", type=_positive(int), default=3, help="optimizer steps (default: 3)"
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="run with few layers, short sequences and a small batch; widths stay as they are",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="in which the verdict is taken (default: fp32); fp64 takes layouts without ZeRO, bf16 "
        "has wide tolerances",
    )
    parser.add_argument(
        "--routes",
        choices=get_args(RoutesUse),
        help="what runs do with the reference's routes: compare their own with them, or replay "
        "them, so that a near-tie of scores changes nothing (default: compare; in bf16 replay)",
    )
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"the largest difference that passes, of {', '.join(QUANTITIES)}; may be repeated",
    )
    parser.add_argument(
        "--eps",
        type=_positive(float),
        default=EPS,
        help=f"share of the global norm (default: {EPS:g})",
    )
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=600,
        metavar="SECONDS",
        help="after which the ranks of a layout are killed (default: 600)",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the run folders in DIR, a new folder"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("runs/verify_layouts.json"),
        metavar="FILE",
        help="where the results go (default: runs/verify_layouts.json)",
    )
    simulated = parser.add_argument_group(
        "simulated worlds", "more ranks than there are: run nothing, show what one of them would be"
    )
    simulated.add_argument(
        "--simulate-world",
        type=_positive(int),
        metavar="W",
        help="the config's own layout on W ranks: groups, shards, memory, what is sent in a step",
    )
    simulated.add_argument(
        "--simulate-rank", type=int, default=0, metavar="R", help="which rank (default: 0)"
    )
    planted = parser.add_argument_group(
        "planted faults", "to see that this tool catches what it claims to"
    )
    planted.add_argument(
        "--fault",
        choices=get_args(FaultKind),
        help="in every run but the reference, scale one parameter's gradient by 1.01, or leave out "
        "one of the reductions of gradients that the layout has",
    )
    planted.add_argument(
        "--fault-seed", type=int, default=0, metavar="K", help="picks which (default: 0)"
    )
    options = parser.parse_intermixed_args(arguments)
    # What stands after --layouts may be either.
    options.overrides += [word for word in options.layouts if "=" in word]
    options.layouts = [
        pattern
        for word in options.layouts
        if "=" not in word
        for pattern in word.replace(",", " ").split()
    ]
    if options.config and options.ranks is None and options.simulate_world is None:
        parser.error("--config needs --ranks or --simulate-world")
    if options.compare and (options.overrides or options.layouts or options.fault):
        parser.error("--compare runs nothing: it takes no overrides, --layouts or --fault")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        passed = _do(options)
    except UserError as error:
        print(f"verify_layouts.py: {error}", file=sys.stderr, flush=True)
        return MISTAKEN
    except ReferenceFailedError as error:
        print(f"verify_layouts.py: {error}", file=sys.stderr, flush=True)
        return DIFFERENT
    except KeyboardInterrupt:
        print("verify_layouts.py: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0 if passed else DIFFERENT


def _do(options: argparse.Namespace) -> bool:
    if options.compare:
        return _compare_folders(options)
    return _verify(options) if options.simulate_world is None else _simulate(options)


def _simulate(options: argparse.Namespace) -> bool:
    config = load_config(options.config, options.overrides)
    # DeepSpeed picks its accelerator when it is imported: after the device is chosen. And all else
    # that this program does leaves the large libraries to the ranks.
    use_device(0)
    from uoe_parallel.analysis.report import print_simulation, simulation_as_json
    from uoe_parallel.analysis.simulate import simulate_world

    simulation = simulate_world(config, options.simulate_world, options.simulate_rank)
    print_simulation(simulation)
    write_json(options.json, simulation_as_json(simulation))
    return True


def _verify(options: argparse.Namespace) -> bool:
    return verify(
        Request(
            config_path=options.config,
            config=load_config(options.config, options.overrides),
            ranks=options.ranks,
            patterns=options.layouts,
            steps=options.steps,
            shrink=options.shrink,
            precision=options.precision,
            routes=options.routes or ("replay" if options.precision == "bf16" else "compare"),
            tolerances=_tolerances(options.tolerance, options.precision),
            eps=options.eps,
            timeout=options.timeout,
            keep=options.keep,
            results=options.json,
            fault=FaultRequest(options.fault, options.fault_seed) if options.fault else None,
        )
    )


def _compare_folders(options: argparse.Namespace) -> bool:
    reference, run = map(RunRecord.open, options.compare)
    if told := differing_fields(reference, run):
        raise UserError(
            f"{reference.folder} and {run.folder} don't train the same model on the same data:\n  "
            + "\n  ".join(told)
        )
    tolerances = _tolerances(options.tolerance, reference.config.training.precision)
    comparison = compare(reference, run, options.eps)
    name = str(run.folder)
    report = Report([name], tolerances)
    report.head()
    report.add(Row(name, comparison, list(comparison.beyond(tolerances)), run.routes()))
    content = {
        "reference": str(reference.folder),
        "precision": reference.config.training.precision,
        "eps": options.eps,
        "tolerances": asdict(tolerances),
        "passed": report.passed,
        "layouts": [row.to_json() for row in report.rows],
    }
    write_json(options.json, content)
    return report.passed


def _tolerances(given: Sequence[str], precision: Precision) -> Tolerances:
    tolerances = DEFAULTS[precision]
    for text in given:
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in QUANTITIES or not 0 <= limit < math.inf:
            raise UserError(
                f"--tolerance {text}: write NAME=VALUE with one of {', '.join(QUANTITIES)} and a "
                "number, such as gradients=1e-3"
            )
        tolerances = replace(tolerances, **{name: limit})
    return tolerances


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A type for argparse: of numbers above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse

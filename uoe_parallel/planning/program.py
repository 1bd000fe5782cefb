"""The program behind tools/plan.py."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from uoe_parallel.config.json_text import write_json
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import rank_from_environment
from uoe_parallel.planning.hardware import MEASURED, Hardware, known_machines, load_hardware

MISTAKEN, INTERRUPTED = 2, 130
"""Exit codes, beside 0."""

_DESCRIPTION = """\
Say what a run will take, before it runs: parameters, memory of the fullest device, operations,
bytes, time of a step. Nothing is computed or sent, and no world is too large.
"""
_EPILOG = """\
examples:
  python tools/plan.py --calibrate
  python tools/plan.py --config configs/cpu_quickstart.yaml --world 2 --gpu this_machine
  python tools/plan.py --config FILE --world 4096 --gpu h100 parallel.pipeline=16
  python tools/plan.py --config FILE --world 4096 --gpu h100 --search

Exit codes: 0 planned, also if it does not fit, which the tables say; 2 a mistake in the command or
the config, or no layout that fits.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the YAML of a run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a field of the file; the value is YAML",
    )
    parser.add_argument(
        "--world",
        type=_positive,
        metavar="N",
        help="devices (default: those of one node)",
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(known_machines())}, {MEASURED} (see --calibrate), or the path of a "
        "profile (default: h100)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank all layouts, micro-batch sizes and recomputations, and print the best as YAML",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine, or under a launcher all its nodes, for --gpu this_machine",
    )
    parser.add_argument(
        "--ranks",
        type=_positive,
        default=2,
        metavar="N",
        help="with --calibrate and no launcher: processes that share this machine (default: 2)",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.calibrate == (options.config is not None):
        parser.error("give --config FILE or --calibrate, one of the two")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        if options.calibrate:
            from uoe_parallel.planning.calibrate import calibrate

            text = calibrate(options.ranks)
            if rank_from_environment() == 0:
                print(text)
        else:
            _plan(options)
    except UserError as error:
        if rank_from_environment() == 0:
            print(f"plan.py: {error}", file=sys.stderr, flush=True)
        return MISTAKEN
    except KeyboardInterrupt:
        print("plan.py: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _plan(options: argparse.Namespace) -> None:
    use_device(0)  # before DeepSpeed is imported
    hardware = load_hardware(options.gpu)
    world_size = options.world or hardware.devices_per_node
    config = load_config(options.config, options.overrides)
    if options.search:
        _search(config, world_size, hardware, options.json)
        return
    from uoe_parallel.planning.plan import plan
    from uoe_parallel.planning.report import plan_as_json, print_plan

    planned = plan(config, world_size, hardware)
    print_plan(planned)
    if options.json:
        write_json(options.json, plan_as_json(planned))


def _search(config: RunConfig, world_size: int, hardware: Hardware, json: Path | None) -> None:
    from uoe_parallel.planning.report import print_search, search_as_json
    from uoe_parallel.planning.search import search

    started = time.perf_counter()
    result = search(config, world_size, hardware)
    print_search(result, time.perf_counter() - started)
    if json:
        write_json(json, search_as_json(result))
    if result.best is None:
        raise UserError(
            f"no layout of {world_size} devices fits, for the reasons above; use more or larger "
            "devices, a smaller model, or other sizes where the rules are the reason"
        )
    print(f"\n# {result.best.layout}, the fastest\n{result.best.choice.as_yaml()}", end="")


def _positive(text: str) -> int:
    """A type for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive int"

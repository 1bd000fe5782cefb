"""Where the time of a run's communication goes: `python tools/profile_comm.py --config FILE`.

    torchrun --standalone --nproc-per-node 2 tools/profile_comm.py --config FILE [--steps N]

Trains the config for some steps from its first weights, under any launcher, records who sends what
when, and holds it against the same collectives alone and against what the config is expected to
send. Writes nothing of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import (
    ParallelGroups,
    distributed,
    rank_from_environment,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="profile_comm", description="Where the time of a run's communication goes."
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument(
        "--steps",
        type=_positive,
        default=10,
        help="steps that are recorded; as many come between them without (default: %(default)s)",
    )
    parser.add_argument(
        "--warmup", type=_positive, default=3, help="steps before them (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for files (default: RUN_DIR/profile)")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train nothing: time collectives of all sizes on every group, which needs no data",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 on every rank for a user's mistake."""
    options = parse_arguments(arguments)
    try:
        world_size = world_size_from_environment()
        checks = [partial(layout_faults, world_size=world_size)]
        config = load_config(options.config, options.overrides, checks)
        with distributed() as device:
            groups = start_groups(ParallelLayout.from_config(config.parallel, world_size))
            out = options.out or Path(config.run_dir) / "profile"
            if options.sweep:
                _sweep(groups, device, out)
            else:
                _profile(config, groups, device, options, out)
    except UserError as error:
        if rank_from_environment() == 0:
            print(f"profile_comm: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    return 0


def _profile(
    config: RunConfig,
    groups: ParallelGroups,
    device: Device,
    options: argparse.Namespace,
    out: Path,
) -> None:
    # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
    from uoe_parallel.profiling.capture import StepCapture, write_shared
    from uoe_parallel.profiling.report import print_profile
    from uoe_parallel.profiling.watch import Watch
    from uoe_parallel.training.console import TrainingConsole
    from uoe_parallel.training.trainer import Trainer

    config = config.model_copy(update={"routes": config.routes.model_copy(update={"record": None})})
    trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
    numbers = range(options.warmup, options.warmup + 2 * options.steps)
    # Pairs begin with the one and with the other in turn, lest what comes second is the same.
    recorded = {n for place, n in enumerate(numbers) if place % 4 in (0, 3)}
    capture = StepCapture(
        config, groups, device, recorded=recorded, plain=set(numbers) - recorded, in_turns=True
    )
    with ExitStack() as around:
        trainer.observers = [capture]
        if config.profile.wait_limit is not None:
            watch = around.enter_context(Watch(groups, config.profile.wait_limit))
            trainer.observers = [watch, capture]
        while trainer.step < numbers.stop:
            trainer.train_step()
    captured = capture.conclude()
    if captured is not None:
        print_profile(captured.profile)
    write_shared(captured, out, groups.world)
    if groups.is_main:
        print(f"\nprofile: {out}")


def _sweep(groups: ParallelGroups, device: Device, out: Path) -> None:
    from uoe_parallel.parallel.agreement import shared_fate
    from uoe_parallel.profiling.alone import sweep
    from uoe_parallel.profiling.charts import write_sweep_chart
    from uoe_parallel.profiling.report import print_sweep

    alone = sweep(groups, device)
    if groups.is_main:
        print_sweep(alone)
    action = f"the sweep cannot be written to {out}"
    with shared_fate(action, "Choose a folder with room", groups.world):
        if alone:
            out.mkdir(parents=True, exist_ok=True)
            tree = [asdict(one) for one in alone]
            (out / "sweep.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
            write_sweep_chart(alone, out / "sweep.png")
    if groups.is_main and alone:
        print(f"sweep: {out}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""Pretrain a Union-of-Experts language model: `python -m uoe_parallel.pretrain --config FILE`.

Start it with torchrun, the deepspeed launcher or mpirun for several ranks, or alone for one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from uoe_parallel.config.load import format_config, load_config
from uoe_parallel.config.schema import RoutingConfig, RunConfig
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, Interrupted, UserError
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.groups import (
    ParallelGroups,
    distributed,
    rank_from_environment,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults
from uoe_parallel.parallel.sameness import check_same

if TYPE_CHECKING:
    from uoe_parallel.profiling.watch import Watch
    from uoe_parallel.training.console import TrainingConsole
    from uoe_parallel.training.trainer import RunSummary, Trainer

FAREWELL = timedelta(seconds=30)
"""How long a rank that cannot begin tries to reach the others to tell them."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uoe-pretrain",
        description="Pretrain a Union-of-Experts language model.",
        epilog="Example: torchrun --standalone --nproc-per-node 2 -m uoe_parallel.pretrain "
        "--config configs/cpu_quickstart.yaml training.steps=100",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a field of the file; the value is YAML",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take one step, report and exit; writes nothing",
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 on every rank for a user's mistake, or 128 and
    the number of the signal that asked it to leave."""
    options = parse_arguments(arguments)
    rank = rank_from_environment()
    world_size = world_size_from_environment()
    # A config can be looked at anywhere, and run only on the ranks that it asks for.
    checks = [] if options.print_config else [partial(layout_faults, world_size=world_size)]
    try:
        config = load_config(options.config, options.overrides, checks)
    except UserError as error:
        if rank == 0:
            _complain(error)
        if not options.print_config:
            _tell_others(error, rank, world_size)
        return USER_ERROR_EXIT_CODE
    if options.print_config:
        if rank == 0:
            print(format_config(config), end="")
        return 0
    layout = ParallelLayout.from_config(config.parallel, world_size)
    try:
        _run(_without_record(config) if options.dry_run else config, layout, options)
    except UserError as error:
        if rank == 0:
            _complain(error)
        return USER_ERROR_EXIT_CODE
    except Interrupted as interrupted:
        return 128 + interrupted.signal
    return 0


def _complain(error: object) -> None:
    print(f"uoe-pretrain: {error}", file=sys.stderr, flush=True)


def _tell_others(error: UserError, rank: int, world_size: int) -> None:
    """See that no rank waits for this one, which cannot begin. Rank 0, if it can, tells the user;
    it has if it cannot either."""
    if world_size == 1:
        return
    try:
        with distributed(FAREWELL):
            _hear_of_faults(error)
    except UserError:
        return
    except RuntimeError:  # there are no others, or none any more
        if rank > 0:
            _complain(f"{error} (seen by rank {rank} on {socket.gethostname()})")


def _hear_of_faults(own: UserError | None = None) -> None:
    """Raise UserError on every rank if one of them cannot begin. Collective over all ranks."""
    with shared_fate("a rank cannot begin", "See to its node", dist.group.WORLD):
        if own is not None:
            raise own


def _run(config: RunConfig, layout: ParallelLayout, options: argparse.Namespace) -> None:
    with distributed() as device:
        _hear_of_faults()
        check_same(config, dist.group.WORLD)
        # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
        from uoe_parallel.training.console import TrainingConsole
        from uoe_parallel.training.interruption import Interruption
        from uoe_parallel.training.trainer import Trainer

        groups = start_groups(layout)
        # Until here a signal ends the process as it ends any other: there is nothing to save.
        with Interruption() as interruption, _watched(config, groups) as watch:
            console = TrainingConsole(quiet=not groups.is_main)
            trainer = Trainer(config, groups, device, console, interruption)
            if watch is not None:
                trainer.observers = (*trainer.observers, watch)
            _introduce(config, groups, trainer, console)
            if options.dry_run:
                _dry_run(trainer, console)
                return
            _profile(trainer, console)
            with closing(trainer.folder):
                trainer.train()
                _conclude(config, options, trainer.finish(), console)


def _watched(config: RunConfig, groups: ParallelGroups) -> AbstractContextManager[Watch | None]:
    """A block in which ranks wait for each other no longer than the config allows."""
    if config.profile.wait_limit is None:
        return nullcontext()
    from uoe_parallel.profiling.watch import Watch

    return Watch(groups, config.profile.wait_limit)


def _profile(trainer: Trainer, console: TrainingConsole) -> None:
    """Look on at the steps that the config names, if it does."""
    if trainer.config.profile.steps == 0:
        return
    from uoe_parallel.profiling.capture import RunProfiler

    profiler = RunProfiler(trainer.config, trainer.groups, trainer.device, console.say)
    trainer.observers = (*trainer.observers, profiler)


def _without_record(config: RunConfig) -> RunConfig:
    """`config` for a run that writes nothing."""
    routes = config.routes.model_copy(update={"record": None})
    return config.model_copy(update={"routes": routes})


def _introduce(
    config: RunConfig, groups: ParallelGroups, trainer: Trainer, console: TrainingConsole
) -> None:
    layout, model = groups.layout, config.model
    kinds = {"feed-forward": config.feed_forward, "attention": config.attention}
    routed = {
        kind: sum(routing.routes(layer) for layer in range(model.num_layers))
        for kind, routing in kinds.items()
    }
    console.table(
        "Union-of-Experts pretraining",
        [
            ("run folder", config.run_dir),
            ("parameters", f"{trainer.num_parameters:,}"),
            (
                "ranks",
                f"{layout.world_size}: tensor {layout.tensor} x pipeline {layout.pipeline} x data "
                f"{layout.data}, expert groups of {layout.expert}, sequence parallel "
                f"{'on' if layout.sequence_parallel else 'off'}, ZeRO {layout.zero_stage}",
            ),
            (
                "experts",
                f"feed-forward {_visited(config.feed_forward)} of "
                f"{config.feed_forward.num_experts} in {routed['feed-forward']} layers, attention "
                f"{_visited(config.attention)} of {model.kv_heads} in {routed['attention']} "
                f"layers, of {model.num_layers}",
            ),
            ("precision", config.training.precision),
            ("experts' products", trainer.products),
            ("picked", trainer.picks),
        ],
    )


def _visited(routing: RoutingConfig) -> int:
    """Experts that a token visits, on average and without drops."""
    return routing.chosen_experts + routing.shared_experts


def _dry_run(trainer: Trainer, console: TrainingConsole) -> None:
    from uoe_parallel.training.evaluation import LOSS_UNITS

    result = trainer.train_step()
    seconds = trainer.timer.take()
    console.table(
        "Dry run: one step taken, nothing written",
        [
            ("loss", f"{result.loss:.4f} {LOSS_UNITS[trainer.config.model.task]}"),
            ("gradient norm", f"{result.gradient_norm:.4f}"),
            *((f"seconds, {part}", f"{value:.3f}") for part, value in seconds.items()),
            ("peak memory of rank 0", f"{trainer.device.peak_memory() / 2**20:,.0f} MiB"),
        ],
    )


def _conclude(
    config: RunConfig, options: argparse.Namespace, summary: RunSummary, console: TrainingConsole
) -> None:
    if summary.text is not None:
        console.say(f"\nSampled from the model:\n{summary.text.rstrip()}\n")
    results = [
        (split, evaluation.describe(" = ")) for split, evaluation in summary.evaluations.items()
    ]
    events = "tensorboard/, " if config.logging.tensorboard else ""
    files = f"{config.run_dir}: config.yaml, metrics.jsonl, {events}checkpoints/"
    console.table("Finished", [*results, ("files", files)])
    console.say(f"To go on from here: {_resume_command(options, 2 * config.training.steps)}")


def _resume_command(options: argparse.Namespace, steps: int) -> str:
    """What continues a finished run; an interrupted one continues with its own command."""
    kept = [item for item in options.overrides if not item.startswith("training.steps=")]
    program = ["-m", "uoe_parallel.pretrain", "--config", str(options.config), *kept]
    ranks, local_ranks = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE")
    if ranks == "1":
        start = [_shown(sys.executable)]
    elif "TORCHELASTIC_RUN_ID" in os.environ and ranks == local_ranks:
        torchrun = Path(sys.executable).with_name("torchrun")
        start = [_shown(torchrun), "--standalone", "--nproc-per-node", ranks]
    else:
        return f"the same launch again with training.steps={steps}"
    return shlex.join([*start, *program, f"training.steps={steps}"])


def _shown(path: str | Path) -> str:
    """Relative to the working folder where that is shorter."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a training step goes, by kinds of operations, from torch's profiler.

    torchrun --standalone --nproc-per-node 2 -m uoe_parallel.benchmark.step_profile --config FILE

Takes the trainer's own steps on the config's data and writes nothing of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from uoe_parallel.config.load import load_config
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.groups import (
    ParallelGroups,
    distributed,
    rank_from_environment,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults

PRODUCTS, ATTENTION, COMMUNICATION = "matrix products", "attention", "communication"
ROWS, OTHER, HOST = "copies, gathers, sorts", "other operations", "host: Python, autograd"
WORK = (PRODUCTS, ATTENTION, COMMUNICATION)
"""What a step is for."""
REST = (ROWS, OTHER, HOST)
"""What comes on top."""

_WAIT = "wait for a collective"
_OF_KIND = {
    PRODUCTS: ("mm", "addmm", "bmm", "baddbmm", "mv", "_grouped_mm", "dot"),
    ROWS: (
        *("copy_", "cat", "clone", "fill_", "zero_", "index", "index_select", "index_copy_"),
        *("index_add_", "_index_put_impl_", "gather", "scatter_", "scatter_add_", "sort", "topk"),
        *("nonzero", "bincount", "embedding_bag", "_embedding_bag", "repeat_interleave"),
        *("_embedding_bag_forward_only", "masked_select", "embedding_dense_backward"),
    ),
}


def kind_of(name: str) -> str:
    """Of an event of the profiler."""
    if name == _WAIT or name.startswith("c10d::"):
        return COMMUNICATION
    if "scaled_dot_product" in name or "_flash_attention" in name:
        return ATTENTION
    if not name.startswith("aten::"):
        return HOST
    operator = name.removeprefix("aten::")
    return next((kind for kind, names in _OF_KIND.items() if operator in names), OTHER)


def seconds_by_kind(events: Iterable[FunctionEvent], wall_seconds: float) -> dict[str, float]:
    """Of the thread that most events are of, every moment counted once: to an event of `WORK` with
    all that it calls, otherwise to the innermost. What lies between events is the host's."""
    events = list(events)
    main = Counter(event.thread for event in events).most_common(1)[0][0]
    seconds: dict[str, float] = defaultdict(float)

    def count(event: FunctionEvent) -> None:
        kind = kind_of(event.name)
        children = [] if kind in WORK else event.cpu_children
        inside = sum(child.time_range.elapsed_us() for child in children)
        seconds[kind] += max(0.0, event.time_range.elapsed_us() - inside) / 1e6
        for child in children:
            count(child)

    for event in events:
        if event.cpu_parent is None and event.thread == main and not event.is_async:
            count(event)
    seconds[HOST] += wall_seconds - sum(seconds.values())
    return {kind: seconds[kind] for kind in WORK + REST}


@contextmanager
def timed_waits() -> Iterator[list[float]]:
    """A list that gets the seconds of each wait for a collective. On a CPU these run in threads of
    their own; the profiler then sees the waits too."""
    wait: Any = dist.Work.wait
    seconds: list[float] = []

    def timed(work: Any, *args: Any) -> Any:
        start = perf_counter()
        with record_function(_WAIT):
            result = wait(work, *args)
        seconds.append(perf_counter() - start)
        return result

    dist.Work.wait = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seconds
    finally:
        dist.Work.wait = wait  # pyright: ignore[reportAttributeAccessIssue]


def profile_steps(trainer: Any, steps: int, warmup: int) -> dict[str, float]:
    """Seconds of this rank by kind, and in all under "step".

    The profiler writes down every operation, which slows what has many small ones. Hence steps and
    their waits are timed without it; products and attention, which are few and long, have what they
    took in as many steps with it, and the others share the rest in the proportions that it saw.
    """

    def take(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            trainer.train_step()
        return perf_counter() - start

    take(warmup)
    with timed_waits() as waits:
        step = take(steps)
    communication = sum(waits)
    with timed_waits(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        profiled = take(steps)
    events: Any = profiler.events()
    seen = seconds_by_kind(events, profiled)
    found = {PRODUCTS: seen[PRODUCTS], ATTENTION: seen[ATTENTION], COMMUNICATION: communication}
    rest = (step - sum(found.values())) / sum(seen[kind] for kind in REST)
    found |= {kind: rest * seen[kind] for kind in REST} | {"step": step}
    return {kind: value / steps for kind, value in found.items()}


def table(by_rank: list[dict[str, float]]) -> str:
    """In Markdown."""
    ranks = range(len(by_rank))
    lines = [
        f"| of a step | {' | '.join(f'rank {rank}' for rank in ranks)} |",
        f"| --- | {' | '.join('---' for _ in ranks)} |",
    ]
    rows = [*((kind, [kind]) for kind in WORK), ("these three", WORK)]
    for name, kinds in [*rows, *((kind, [kind]) for kind in REST)]:
        shares = [sum(found[kind] for kind in kinds) / found["step"] for found in by_rank]
        lines.append(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    milliseconds = [f"{1e3 * found['step']:.1f}" for found in by_rank]
    return "\n".join([*lines, f"| ms | {' | '.join(milliseconds)} |"])


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 on every rank for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--steps", type=int, default=20, help="profiled steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--json", type=Path, help="file for the seconds of every rank")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        _run(options)
    except UserError as error:
        if rank_from_environment() == 0:
            print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    world_size = world_size_from_environment()
    config = load_config(
        options.config, options.overrides, [lambda c: layout_faults(c, world_size=world_size)]
    )
    with distributed() as device:
        # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
        from uoe_parallel.training.console import TrainingConsole
        from uoe_parallel.training.trainer import Trainer

        groups = start_groups(ParallelLayout.from_config(config.parallel, world_size))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        by_rank = _gathered(profile_steps(trainer, options.steps, options.warmup), groups)
        if groups.is_main:
            print(f"{options.steps} steps, {torch.get_num_threads()} threads a rank\n")
            print(table(by_rank))
            if options.json is not None:
                options.json.write_text(json.dumps(by_rank, indent=2) + "\n")


def _gathered(found: dict[str, float], groups: ParallelGroups) -> list[dict[str, float]]:
    by_rank: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(by_rank, found, group=groups.world)
    return by_rank


if __name__ == "__main__":
    sys.exit(main())

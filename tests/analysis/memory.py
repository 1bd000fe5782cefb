"""What runs inside the rank processes for the tests of memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.model.cases import build_model, random_tokens, start
from uoe_parallel.analysis.activations import Activations
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.memory import StepMemory, step_memory
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.states import ModelStates, StateRules
from uoe_parallel.analysis.work import BlockWork, Workload, expected_work
from uoe_parallel.benchmark.allocations import kept_for_backward, storage_bytes
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.parallel.device import DTYPES, use_device
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

_WATCHED = "the step that is watched"


@dataclass(frozen=True)
class RealStep:
    """One rank's optimizer step, as it was."""

    peak: int
    """The most bytes that live at a time, of all that were allocated since there was a trainer."""
    work: Workload
    """Of its first micro-batch."""


def watched_steps(config: RunConfig) -> list[RealStep]:
    """The third and the fourth step of training."""
    groups, device = start(config), use_device(0)
    works: list[Workload] = []
    on_cuda: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        for _ in range(2):
            trainer.train_step()
        for _ in range(2):
            if device.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            with record_function(_WATCHED), _recorded_work() as recorded:
                trainer.train_step()
            works.append(dict(zip(trainer.model.routed_blocks(), recorded, strict=False)))
            if device.is_cuda:
                on_cuda.append(device.peak_memory())
    peaks = on_cuda or _peaks(profiler)
    return [RealStep(*step) for step in zip(peaks, works, strict=True)]


def _peaks(profiler: profile) -> list[int]:
    """Of what lives at a time, in each watched step.

    Frees are not all seen: another thread, such as gloo's, may be the last to hold a message. What
    lies where something else is allocated has been freed.
    """
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    todo: list[Any] = profiler.profiler.kineto_results.experimental_event_tree()
    changes: list[tuple[int, int, int]] = []
    watched: list[tuple[int, int]] = []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.tag == _EventType.TorchOp and event.name == _WATCHED:
            watched.append((event.start_time_ns, event.end_time_ns))
    starts: list[int] = []
    sizes: dict[int, int] = {}
    level, levels = 0, []
    for at, address, size in sorted(changes, key=lambda change: change[0]):
        place = bisect_left(starts, address)
        if size > 0:
            if place > 0 and starts[place - 1] + sizes[starts[place - 1]] > address:
                place -= 1
            while place < len(starts) and starts[place] < address + size:
                level -= sizes.pop(starts.pop(place))
            starts.insert(place, address)
            sizes[address] = size
            level += size
        elif address in sizes:
            level -= sizes.pop(starts.pop(place))
        levels.append((at, level))
    return [
        max(level for at, level in levels if begin <= at <= end) for begin, end in sorted(watched)
    ]


@contextmanager
def _recorded_work() -> Iterator[list[BlockWork]]:
    """Of all forward passes of routed blocks, in their order."""
    recorded: list[BlockWork] = []
    sizes: list[ExchangeSizes] = []
    names = "plan_exchange", "plan_arrivals", "plan_local"
    originals = {name: getattr(dispatcher, name) for name in names}

    def exchange(*arguments: Any) -> Any:
        plan = originals["plan_exchange"](*arguments)
        sizes.append(ExchangeSizes.of_plan(plan))
        return plan

    def arrivals(*arguments: Any) -> Any:
        assignment, order = originals["plan_arrivals"](*arguments)
        recorded.append(BlockWork.of(assignment, sizes.pop()))
        return assignment, order

    def local(*arguments: Any) -> Any:
        assignment, experts = originals["plan_local"](*arguments)
        recorded.append(BlockWork.of(assignment, None))
        return assignment, experts

    replaced = {"plan_exchange": exchange, "plan_arrivals": arrivals, "plan_local": local}
    for name, function in replaced.items():
        setattr(dispatcher, name, function)
    try:
        yield recorded
    finally:
        for name, function in originals.items():
            setattr(dispatcher, name, function)


def predict(config: RunConfig, works: list[list[Workload]]) -> list[list[StepMemory]]:
    """Of all ranks of the same run, one after the other in this process, without data: of each of
    several steps."""
    dist.destroy_process_group()
    predicted, world = [], len(works)
    for rank, steps in enumerate(works):
        with simulated_groups(ParallelLayout.from_config(config.parallel, world), rank) as groups:
            model = build_stage(config, groups)
            on_cuda = torch.cuda.is_available()
            predicted.append([step_memory(model, config, w, on_cuda=on_cuda) for w in steps])
    return predicted


def kept_bytes(config: RunConfig) -> tuple[int, int]:
    """Of a forward pass on one rank: what autograd keeps, and what is computed."""
    groups = start(config)
    model = build_model(config, groups, DTYPES[config.training.precision])
    tokens = random_tokens(config)[: config.training.micro_batch_size]
    with kept_for_backward() as kept, _recorded_work() as recorded:
        loss = model(tokens, tokens)
    saved = storage_bytes(kept, besides=[tokens, *model.parameters()])
    del loss
    work = dict(zip(model.routed_blocks(), recorded, strict=True))
    stage = Activations(model, config, work, on_cuda=False).stage()
    return saved, stage.kept.total


def first_stage_memory(
    config: RunConfig, world: int, in_flight: Sequence[int | None], *, on_cuda: bool
) -> tuple[list[StepMemory], ModelStates, int]:
    """Of rank 0 of a world, with so many micro-batches in flight; its states, and what it keeps of
    one micro-batch."""
    dist.destroy_process_group()
    with simulated_groups(ParallelLayout.from_config(config.parallel, world), 0) as groups:
        model = build_stage(config, groups)
        work = expected_work(model, config)
        memories = [step_memory(model, config, work, n, on_cuda=on_cuda) for n in in_flight]
        kept = Activations(model, config, work, on_cuda=on_cuda).stage().kept
        return memories, StateRules(model, config).states, kept.total

"""What runs inside the rank processes for the tests of memory."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.model.cases import start
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.memory import StepMemory, step_memory
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.work import BlockWork, Workload
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

_WATCHED = "the step that is watched"


@dataclass(frozen=True)
class RealStep:
    """One rank's third optimizer step, as it was."""

    peak: int
    """The most bytes that live at a time, of all that were allocated since there was a trainer."""
    work: Workload
    """Of its first micro-batch."""


def peak_of_step(config: RunConfig) -> RealStep:
    """Three steps of training; the third is watched."""
    groups = start(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(config, groups, use_device(0), TrainingConsole(quiet=True))
        for _ in range(2):
            trainer.train_step()
        gc.collect()
        with record_function(_WATCHED), _recorded_work() as recorded:
            trainer.train_step()
    blocks = trainer.model.routed_blocks()
    return RealStep(_peak(profiler), dict(zip(blocks, recorded, strict=False)))


def _peak(profiler: profile) -> int:
    """Of what lives at a time. Frees are not all seen: other threads, such as gloo's, may be the
    last to hold a message. What lies where something else is allocated has been freed."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    todo: list[Any] = profiler.profiler.kineto_results.experimental_event_tree()
    changes: list[tuple[int, int, int]] = []
    begin = end = 0
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.tag == _EventType.TorchOp and event.name == _WATCHED:
            begin, end = event.start_time_ns, event.end_time_ns
    starts: list[int] = []
    sizes: dict[int, int] = {}
    level = peak = 0
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
        if begin <= at <= end:
            peak = max(peak, level)
    return peak


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


def predict(config: RunConfig, world: int, work: list[Workload]) -> list[StepMemory]:
    """Of all ranks of the same run, one after the other in this process, without data."""
    dist.destroy_process_group()
    predicted = []
    for rank in range(world):
        with simulated_groups(ParallelLayout.from_config(config.parallel, world), rank) as groups:
            model = build_stage(config, groups)
            predicted.append(step_memory(model, config, work[rank], on_cuda=False))
    return predicted

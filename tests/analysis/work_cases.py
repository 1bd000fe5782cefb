"""What runs inside the rank processes for the tests of what routed blocks are given to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tests.model.cases import build_model, random_tokens, start
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.work import BlockWork, Workload, expected_work, worst_work
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.model.context import Context
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.layout import ParallelLayout


@dataclass
class Recorded:
    """What micro-batches gave a rank to do, in order."""

    work: list[BlockWork] = field(default_factory=list)
    """Of one routed block after the other."""
    sizes: list[ExchangeSizes | None] = field(default_factory=list)
    """Of their exchanges, None where rows don't travel."""
    contexts: list[Context] = field(default_factory=list)

    def micro_batches(self, names: list[str]) -> Iterator[tuple[Workload, Context]]:
        for number, context in enumerate(self.contexts):
            work = self.work[number * len(names) : (number + 1) * len(names)]
            yield dict(zip(names, work, strict=True)), context


@contextmanager
def recorded(model: LanguageModel, *, recomputes: bool) -> Iterator[Recorded]:
    """While passes run, what their first ones plan."""
    record, sizes = Recorded(), None
    exchange, arrivals, local = (
        dispatcher.plan_exchange,
        dispatcher.plan_arrivals,
        dispatcher.plan_local,
    )

    def note(assignment: Assignment, exchanged: ExchangeSizes | None) -> None:
        if torch.is_grad_enabled() != recomputes:
            record.work.append(BlockWork.of(assignment, exchanged))
            record.sizes.append(exchanged)

    def plan_exchange(*arguments: Any) -> Any:
        nonlocal sizes
        plan = exchange(*arguments)
        sizes = ExchangeSizes.of_plan(plan)
        return plan

    def plan_arrivals(*arguments: Any) -> Any:
        planned = arrivals(*arguments)
        note(planned[0], sizes)
        return planned

    def plan_local(*arguments: Any) -> Any:
        planned = local(*arguments)
        note(planned[0], None)
        return planned

    def context(*arguments: Any) -> Context:
        record.contexts.append(LanguageModel.context(model, *arguments))
        return record.contexts[-1]

    planners = {"exchange": plan_exchange, "arrivals": plan_arrivals, "local": plan_local}
    try:
        model.context = context  # pyright: ignore[reportAttributeAccessIssue]
        for name, planner in planners.items():
            setattr(dispatcher, f"plan_{name}", planner)
        yield record
    finally:
        del model.context
        for name, planner in (("exchange", exchange), ("arrivals", arrivals), ("local", local)):
            setattr(dispatcher, f"plan_{name}", planner)


def work_of_a_pass(config: RunConfig) -> list[tuple[BlockWork, ExchangeSizes | None]]:
    """Of each routed block in a forward pass of one micro-batch."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config, seed=groups.data_rank)[: config.training.micro_batch_size]
    with recorded(model, recomputes=False) as record:
        model(tokens)
    return list(zip(record.work, record.sizes, strict=True))


def work_without_a_run(config: RunConfig, world_size: int) -> list[tuple[Workload, Workload]]:
    """Expected and worst, of each rank of a world."""
    dist.destroy_process_group()
    layout = ParallelLayout.from_config(config.parallel, world_size)
    works = []
    for rank in range(world_size):
        with simulated_groups(layout, rank) as groups:
            stage = build_stage(config, groups)
            works.append((expected_work(stage, config), worst_work(stage, config)))
    return works

"""What runs inside the rank processes for the tests of floating-point operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.model.cases import build_model, random_tokens, start
from tests.tiny import VOCAB_SIZE
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.flop_counter import flop_counter
from uoe_parallel.analysis.flops import Computation, micro_batch_flops
from uoe_parallel.analysis.simulate import build_stage
from uoe_parallel.analysis.work import BlockWork, Workload, expected_work, worst_work
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.model.context import Context
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.device import use_device
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

Flops = dict[tuple[str, str], int]
"""By "forward" or "backward", what that recomputes included, and "attention" or "products"."""


@dataclass
class Recorded:
    """What micro-batches gave a rank to do, in order."""

    work: list[BlockWork] = field(default_factory=list)
    """Of one routed block after the other."""
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


def pass_of_a_model(
    config: RunConfig, documents_BS: Tensor | None = None
) -> tuple[Flops, list[Computation]]:
    """One micro-batch's passes as counted, and as computed of what they were given to do."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config, seed=groups.data_rank)[: config.training.micro_batch_size]
    if documents_BS is not None:
        documents_BS = documents_BS.roll(groups.data_rank, 0)
    recomputes = config.training.recompute == "full"
    forward, backward = flop_counter(), flop_counter()
    with recorded(model, recomputes=recomputes) as record:
        with forward:
            loss = model(tokens, tokens.roll(-1, 1), documents_BS).mean()
        with backward:
            loss.backward()
    stage = build_stage(config, groups)
    ((work, context),) = record.micro_batches(list(stage.routed_blocks()))
    given = None if documents_BS is None else context
    counted = _counted("forward", forward) | _counted("backward", backward)
    return counted, micro_batch_flops(stage, config, work, given)


def step_of_a_trainer(config: RunConfig) -> tuple[int, list[Computation]]:
    """All micro-batches of a step."""
    groups = start(config)
    trainer = Trainer(config, groups, use_device(0), TrainingConsole(quiet=True))
    recomputes = config.training.recompute == "full"
    with recorded(trainer.model, recomputes=recomputes) as record, flop_counter() as counter:
        trainer.train_step()
    stage, computed = build_stage(config, groups), []
    for work, context in record.micro_batches(list(stage.routed_blocks())):
        computed += micro_batch_flops(stage, config, work, context)
    return counter.get_total_flops(), computed


def _counted(phase: str, counter: FlopCounterMode) -> Flops:
    flops: Flops = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        scores = "attention" in str(operator) or "bmm" in str(operator)
        flops[phase, "attention" if scores else "products"] += count
    return dict(flops)

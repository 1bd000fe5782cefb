"""What runs on ranks: tiny layers, and contenders that are not what they claim to be."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from tests import reference
from uoe_parallel.benchmark import feed_forward
from uoe_parallel.benchmark.comparable import IncomparableError, Work, check_comparable
from uoe_parallel.benchmark.contenders import (
    Contender,
    DenseContender,
    Foreign,
    RoutedContender,
)
from uoe_parallel.benchmark.deepspeed_moe import CAPACITY_1, DROPLESS
from uoe_parallel.benchmark.feed_forward import measure_narrow, measure_wide
from uoe_parallel.benchmark.megatron_moe import MEGATRON
from uoe_parallel.benchmark.problem import Problem
from uoe_parallel.benchmark.session import Session
from uoe_parallel.benchmark.sizes import Sizes
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.experts.mlp import DenseMLPWeights
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout

TINY = Sizes(tokens=64, sequence=16, hidden=32, ffn=64, experts=4, top_k=2, heads=2)


def start(sizes: Sizes = TINY, rounds: int = 2) -> Session:
    world = dist.get_world_size()
    deepspeed.init_distributed("gloo", verbose=False, dist_init_required=None)
    layout = ParallelLayout(world, world, 1, world, sequence_parallel=world > 1, zero_stage=0)
    return Session(start_groups(layout), use_device(0), sizes, LoopBackend(), rounds)


def everybody(session: Session, problem: Problem) -> list[Contender]:
    return [
        RoutedContender(session, problem),
        DenseContender.of_active_width(session, problem),
        DenseContender.of_full_width(session, problem),
        *(foreign.build(session, problem) for foreign in (MEGATRON, DROPLESS, CAPACITY_1)),
    ]


def work_of_everybody(sizes: Sizes) -> dict[str, Work]:
    session = start(sizes)
    contenders = everybody(session, Problem.draw(session, sizes))
    works = check_comparable(contenders, session.groups.world)
    return {contender.name: work for contender, work in zip(contenders, works, strict=True)}


def against_the_reference(sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """On one rank: what each contender gives, and what the tests' own reference does."""
    session = start(sizes)
    problem = Problem.draw(session, sizes)
    weights = DenseMLPWeights(
        up_FD=problem.up_EFD.flatten(0, 1).double(),
        down_DF=torch.cat(list(problem.down_EDF), dim=1).double(),
    )
    outcomes = {}
    for contender in everybody(session, problem):
        y_SBD = contender.run()
        gates_SBE = contender.gates().double().unflatten(0, y_SBD.shape[:2])
        x_SBD = problem.x_SBD.detach().double()
        expected = reference.routed_mlp(x_SBD, gates_SBE != 0, gates_SBE, weights, "gelu")
        outcomes[contender.name] = (y_SBD, expected)
    return outcomes


def gates_of_everybody() -> dict[str, Tensor]:
    session = start()
    contenders = everybody(session, Problem.draw(session, TINY))
    return {contender.name: contender.gates() for contender in contenders}


def stand_ins_left() -> list[str]:
    """What of torch and megatron-core is not as it was once megatron-core's layer has run."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    places = (torch.cuda, moe_utils, token_dispatcher, token_dispatcher.MoEAlltoAllTokenDispatcher)
    session = start()
    before = [dict(vars(place)) for place in places]
    contender = MEGATRON.build(session, Problem.draw(session, TINY))
    contender.run()
    contender.gates()
    after = [dict(vars(place)) for place in places]
    return [
        name
        for old, new in zip(before, after, strict=True)
        for name in old.keys() | new.keys()
        if old.get(name, "absent") is not new.get(name, "absent")
    ]


class _LosesAPair(RoutedContender):
    def __init__(self, session: Session, problem: Problem) -> None:
        super().__init__(session, problem)
        self.block.router.with_shared = _without_first  # pyright: ignore[reportAttributeAccessIssue]


def _without_first(values_SBE: Tensor) -> Tensor:
    if values_SBE.dtype is not torch.bool:
        return values_SBE
    kept = values_SBE.clone()
    kept[0, 0] = False
    return kept


class _TooWide(DenseContender):
    def __init__(self, session: Session, problem: Problem) -> None:
        super().__init__("wide", session, problem, problem.sizes.experts)
        self.pairs_per_token = problem.sizes.top_k


class _RunsTwice(RoutedContender):
    def forward(self) -> tuple[Tensor, ...]:
        super().forward()
        return super().forward()


class _CutsShort(RoutedContender):
    def run(self) -> Tensor:
        return super().run()[:-1]


def _with(change: str, session: Session, problem: Problem) -> Contender:
    if change == "upstream" and session.groups.rank == session.groups.world.size() - 1:
        problem.upstream_SBD.fill_(torch.inf)
    contender = MEGATRON.build(session, problem)
    layer: Any = contender.layer
    with torch.no_grad():
        if change == "router":
            layer.router.weight.neg_()
        if change == "weight":
            layer.experts.local_experts[0].linear_fc1.weight.mul_(2)
    if change == "frozen":
        layer.router.weight.requires_grad_(False)
    return contender


def verdict(wrong: str) -> str:
    """What the check says of a contender that is wrong, "" if it finds nothing."""
    session = start()
    problem = Problem.draw(session, TINY)
    classes = {
        "pair": _LosesAPair,
        "width": _TooWide,
        "twice": _RunsTwice,
        "shape": _CutsShort,
    }
    if wrong in classes:
        contender = classes[wrong](session, problem)
    else:
        contender = _with(wrong, session, problem)
    try:
        check_comparable([RoutedContender(session, problem), contender], session.groups.world)
    except IncomparableError as error:
        return str(error)
    return ""


def foreign_that_fails_on_last_rank() -> object:
    session = start()
    problem = Problem.draw(session, TINY)

    def build(session: Session, problem: Problem) -> Contender:
        if session.groups.rank == session.groups.world.size() - 1:
            raise RuntimeError("no such\nkernel")
        return RoutedContender(session, problem)

    return feed_forward._try(Foreign("theirs", "no-such-library", build), session, problem)


def wide_and_narrow() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    session = start(replace(TINY, ffn=256))
    return measure_wide(session), measure_narrow(session)


def measure_nothing(session: Session) -> list[dict[str, Any]]:
    """A section."""
    ranks = session.groups.world.size()
    return [{"contender": "nothing", "ranks_seen": ranks, "seconds": [0.001, 0.003, 0.002]}]


def compare_nothing(session: Session) -> list[dict[str, Any]]:
    """A section."""
    raise IncomparableError("one computes less than the other")


def fail(session: Session) -> list[dict[str, Any]]:
    """A section."""
    raise RuntimeError(f"broken on rank {os.environ['RANK']}")

"""The sections about feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from textwrap import shorten
from typing import Any

import torch

from uoe_parallel.benchmark.comparable import Work, check_comparable
from uoe_parallel.benchmark.contenders import (
    DENSE,
    OURS,
    Contender,
    DenseContender,
    Foreign,
    RoutedContender,
)
from uoe_parallel.benchmark.deepspeed_moe import CAPACITY_1, DROPLESS
from uoe_parallel.benchmark.megatron_moe import MEGATRON
from uoe_parallel.benchmark.problem import Problem
from uoe_parallel.benchmark.session import Session
from uoe_parallel.benchmark.timing import ratios, time_in_turn
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

Entry = dict[str, Any]

WIDE = (8, 2)
NARROW = ((8, 1), (16, 2), (32, 4), (64, 8))
"""(experts, experts of a token): ever narrower slices, of the same active width."""


def measure(session: Session) -> list[Entry]:
    """This project's layer, dense ones and those of other libraries."""
    problem = Problem.draw(session, session.sizes)
    dense = [
        DenseContender.of_active_width(session, problem),
        DenseContender.of_full_width(session, problem),
    ]
    return _race(session, [problem], dense, [MEGATRON, DROPLESS, CAPACITY_1])


def measure_wide(session: Session) -> list[Entry]:
    """Few wide slices of a block of twice the width."""
    n, k = WIDE
    problem = Problem.draw(
        session, replace(session.sizes, ffn=2 * session.sizes.ffn, experts=n, top_k=k)
    )
    return _race(session, [problem], [DenseContender.of_active_width(session, problem)], [])


def measure_narrow(session: Session) -> list[Entry]:
    """One block cut into ever more slices, the active width being the same."""
    problems = [
        Problem.draw(session, replace(session.sizes, experts=n, top_k=k)) for n, k in NARROW
    ]
    dense = DenseContender.of_active_width(session, problems[0])
    return _race(session, problems, [dense], [MEGATRON, DROPLESS])


def _race(
    session: Session,
    problems: Sequence[Problem],
    dense: Sequence[Contender],
    foreign: Sequence[Foreign],
) -> list[Entry]:
    """Entries of this project's layers and the foreign ones, one of each for each problem, and of
    the dense ones, the first of which has the active width of all. Collective over all ranks."""
    contenders: list[Contender] = [RoutedContender(session, problem) for problem in problems]
    contenders += dense
    missing: list[Entry] = []
    for problem in problems:
        for other in foreign:
            built = _try(other, session, problem)
            if isinstance(built, str):
                missing.append(_names(other.name, problem) | {"not_measured": built})
            else:
                contenders.append(built)
    group = session.groups.world
    works = check_comparable(contenders, group)
    runs = {str(number): contender.run for number, contender in enumerate(contenders)}
    seconds = time_in_turn(
        runs, rounds=session.rounds, warmup=session.warmup, group=group, device=session.device
    ).values()
    timed = list(zip(contenders, works, seconds, strict=True))
    entries = [_entry(contender, work, took, timed) for contender, work, took in timed]
    return [*entries, *missing, *_flatness(timed)]


def _try(foreign: Foreign, session: Session, problem: Problem) -> Contender | str:
    """A contender that runs, or why there is none: the same on all ranks, but for the words."""
    built: list[Contender] = []
    # Ranks agree in between: those that have a layer would wait in its exchanges for the others.
    steps: tuple[Callable[[], object], ...] = (
        lambda: built.append(foreign.build(session, problem)),
        lambda: (built[0].run(), built[0].gates()),
    )
    for step in steps:
        reason = None
        try:
            step()
        except Exception as error:  # Whatever a version of a library comes up with.
            library = f"{foreign.library} {_version(foreign.library)}"
            reason = f"{library}: {type(error).__name__}: {shorten(str(error), 200)}"
        failed = torch.tensor(reason is not None).to(session.device.torch_device, torch.int64)
        if comm.max_over(failed, session.groups.world, purpose=Purpose.MEASUREMENT):
            return reason or "it failed on another rank"
    return built[0]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


Timed = tuple[Contender, Work, list[float]]


def _names(name: str, problem: Problem) -> Entry:
    sizes = problem.sizes
    return {"contender": name, "experts": sizes.experts, "top_k": sizes.top_k}


def _entry(contender: Contender, work: Work, seconds: list[float], timed: list[Timed]) -> Entry:
    sizes = contender.problem.sizes
    [dense] = [other for other in timed if other[0].name == DENSE]
    [ours] = [other for other in timed if other[0].name == OURS and other[0].problem.sizes == sizes]
    names = _names(contender.name, contender.problem)
    if not contender.is_routed:
        names |= {"experts": None, "top_k": None}
    # Slices of another number are no other layer to a dense one.
    is_alone = contender.is_routed or len([o for o in timed if o[0].name == OURS]) == 1
    return {
        **names,
        "ffn": sizes.expert_ffn * contender.pairs_per_token,
        "seconds": seconds,
        "ours_over_this": asdict(ratios(ours[2], seconds)) if is_alone else None,
        "this_over_dense": asdict(ratios(seconds, dense[2])),
        "multiply_adds_over_dense": work.multiply_adds / dense[1].multiply_adds,
        "multiply_adds": work.multiply_adds,
        "pairs": work.pairs,
        "rows": work.rows,
    }


def _flatness(timed: list[Timed]) -> list[Entry]:
    """How much the most slices cost over the fewest, where there are several numbers of them."""
    ours = [(contender, seconds) for contender, _, seconds in timed if contender.name == OURS]
    (first, first_seconds), (last, last_seconds) = ours[0], ours[-1]
    if first is last:
        return []
    few, most = first.problem.sizes, last.problem.sizes
    return [
        {
            "compared": f"{OURS}: n {most.experts}, k {most.top_k} over n {few.experts}, "
            f"k {few.top_k}",
            "ratio": asdict(ratios(last_seconds, first_seconds)),
        }
    ]

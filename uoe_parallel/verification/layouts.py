"""Which layouts are compared, how each one is named, and why others can't run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from uoe_parallel.config.checks import RULES
from uoe_parallel.config.faults import Fault
from uoe_parallel.config.rules import BALANCE_RULES, load_rule
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.layout import (
    ParallelLayout,
    candidate_layouts,
    why_not,
    with_parallel,
)
from uoe_parallel.verification.settings import largest_divisor, with_fields


@dataclass(frozen=True)
class Candidate:
    """A mix of axes and a ZeRO stage, and the config that would run under it."""

    layout: ParallelLayout
    config: RunConfig
    """With the largest micro-batch, up to the given one, that fits the layout's data size: steps
    are sums over sequences, so it changes no number."""
    fault: Fault | None
    """Why it can't run."""

    @property
    def name(self) -> str:
        return str(self.layout)


@dataclass(frozen=True)
class Selection:
    runs: list[Candidate]
    left_out: list[Candidate]
    """What was asked for, or stood to be chosen, and can't run."""


def candidates(config: RunConfig, ranks: int) -> list[Candidate]:
    """Every layout of 1 to `ranks` ranks, fit for `config` or not."""
    found = []
    for world_size in range(1, ranks + 1):
        for parallel in candidate_layouts(world_size):
            layout = ParallelLayout.from_config(parallel, world_size)
            mixed = _with_fitting_micro_batch(with_parallel(config, parallel), layout.data)
            found.append(Candidate(layout, mixed, _fault(mixed, world_size)))
    return found


def select(found: Sequence[Candidate], patterns: Iterable[str]) -> Selection:
    """Those whose names match one of `patterns`; without patterns, those of 2 and more ranks.

    Raises UserError for a pattern that matches no layout, or only some that can't run.
    """
    patterns = list(patterns)
    if not patterns:
        chosen = [candidate for candidate in found if candidate.layout.world_size > 1]
        if not any(candidate.fault is None for candidate in chosen):
            most = max(candidate.layout.world_size for candidate in found)
            raise UserError(_none_runs(f"no layout of 2 to {most} ranks can run", chosen))
    else:
        chosen = []
        for pattern in patterns:
            matching = [c for c in found if fnmatchcase(c.name, pattern)]
            if not any(candidate.fault is None for candidate in matching):
                raise UserError(_complaint(pattern, matching, found))
            chosen += [candidate for candidate in matching if candidate not in chosen]
        chosen.sort(key=found.index)
    return Selection(
        [candidate for candidate in chosen if candidate.fault is None],
        [candidate for candidate in chosen if candidate.fault is not None],
    )


def reasons(left_out: Iterable[Candidate]) -> dict[str, list[str]]:
    """Names of layouts by the reason why they can't run. Reasons that differ in sizes alone are
    told once, in the words of the first."""
    told: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for candidate in left_out:
        assert candidate.fault is not None
        _, names = told.setdefault(candidate.fault.fields, (str(candidate.fault), []))
        names.append(candidate.name)
    return dict(told.values())


def _with_fitting_micro_batch(config: RunConfig, data: int) -> RunConfig:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % data:
        return config  # which is told as the layout's fault
    if _balances_batches(config):  # whose loss is of a micro-batch on all data ranks
        micro = batch // data
    fitting = largest_divisor(batch // data, at_most=micro)
    return with_fields(config, training={"micro_batch_size": fitting})


def _balances_batches(config: RunConfig) -> bool:
    names = [*(config.feed_forward.balance or []), *(config.attention.balance or [])]
    return any(load_rule(BALANCE_RULES, name).scope == "batch" for name in names)


def _fault(config: RunConfig, world_size: int) -> Fault | None:
    others = (fault for rule in RULES for fault in rule(config))
    return why_not(config, world_size) or next(others, None)


def _complaint(pattern: str, matching: list[Candidate], found: Sequence[Candidate]) -> str:
    if matching:
        return _none_runs(f"--layouts: {pattern} can't run", matching)
    names = " ".join(candidate.name for candidate in found if candidate.fault is None)
    return f"--layouts: {pattern} matches no layout; of those up to --ranks, these can run: {names}"


def _none_runs(what: str, left_out: list[Candidate]) -> str:
    told = [f"\n  - {', '.join(names)}: {reason}" for reason, names in reasons(left_out).items()]
    return f"{what}:{''.join(told)}"

"""Every layout of a number of devices: which fit, how fast each is, and why the others don't."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import (
    ParallelLayout,
    candidate_layouts,
    why_not,
    with_parallel,
)
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.stage import Rank, Stage, representative_stages, simulated_stage
from uoe_parallel.planning.variants import Choice, Found, Misfit, fastest

SHORTLIST = 10
"""How many of the fastest layouts are looked at once more, under the worst routes."""


@dataclass
class Refused:
    """Layouts that don't fit for one reason."""

    count: int = 0
    example: str = ""
    """The name of one of them, and what is wrong with it."""
    least: int | None = None
    """Bytes that the least demanding of them needs, if memory is the reason."""


@dataclass(frozen=True)
class Search:
    """What came of it."""

    found: list[Found] = field(default_factory=list)
    """The fastest first, one for each layout."""
    worst: list[int] = field(default_factory=list)
    """Bytes of the fullest device at the worst routes, for each of the first `SHORTLIST`."""
    refused: dict[str, Refused] = field(default_factory=dict)
    """By reason."""

    @property
    def best(self) -> Found | None:
        return self.found[0] if self.found else None


def search(config: RunConfig, world_size: int, hardware: Hardware) -> Search:
    """All layouts of `world_size` devices, with every micro-batch size that is a power of two and
    the least recomputation that makes it fit.

    Tensor groups stay inside a node. Raises UserError if the hardware has no figure for the
    config's precision.
    """
    hardware.peak(config.training.precision)
    result = Search()
    for layouts in _by_axes(config, world_size, hardware, result.refused):
        stages = _stages(config, layouts[0], world_size, hardware)
        for parallel in layouts:
            sizes = _sizes(config, parallel, world_size)
            outcome = fastest(config, parallel, sizes, stages)
            if isinstance(outcome, Found):
                result.found.append(outcome)
            else:
                _refuse_misfit(result.refused, parallel, world_size, outcome)
    result.found.sort(key=lambda found: (found.time.seconds, str(found.layout)))
    for found in result.found[:SHORTLIST]:
        changed = found.choice.of(config)
        stages = _stages(changed, found.choice.parallel, world_size, hardware)
        peak = max(Rank(stage, changed).worst_memory.peak for stage in stages)
        result.worst.append(hardware.needed(peak))
    return result


def _stages(
    config: RunConfig, parallel: ParallelConfig, world_size: int, hardware: Hardware
) -> list[Stage]:
    changed = with_parallel(config, parallel)
    layout = ParallelLayout.from_config(parallel, world_size)
    return [
        simulated_stage(changed, layout, stage, hardware)
        for stage in representative_stages(changed, layout)
    ]


def _by_axes(
    config: RunConfig, world_size: int, hardware: Hardware, refused: dict[str, Refused]
) -> Iterator[list[ParallelConfig]]:
    """The layouts that the rules allow, those together whose ranks build the same model; notes why
    the others are none."""
    grouped: dict[ParallelConfig, list[ParallelConfig]] = defaultdict(list)
    smallest = Choice(config.parallel, 1, config.training.recompute).of(config)
    for parallel in candidate_layouts(world_size):
        name = str(ParallelLayout.from_config(parallel, world_size))
        if parallel.tensor > hardware.devices_per_node:
            reason = f"tensor groups reach beyond a node of {hardware.devices_per_node} devices"
            _refuse(refused, reason, name)
        elif fault := why_not(with_parallel(smallest, parallel), world_size):
            about = fault.fields[0] if "." in fault.fields[0] else "parallel"
            example = f"{name}: {' or '.join(fault.fields[:1])} = {fault.value!r} {fault.problem}"
            _refuse(refused, f"the rules of {about}", example)
        else:
            axes = parallel.model_copy(update={"zero_stage": 0})
            grouped[axes].append(parallel)
    yield from grouped.values()


def _sizes(config: RunConfig, parallel: ParallelConfig, world_size: int) -> list[int]:
    """Powers of two that divide what a data-parallel rank has in a step."""
    sequences = config.training.global_batch_size * parallel.tensor * parallel.pipeline
    each = sequences // world_size
    return [2**n for n in range(each.bit_length()) if each % 2**n == 0]


def _refuse_misfit(
    refused: dict[str, Refused], parallel: ParallelConfig, world_size: int, misfit: Misfit
) -> None:
    name = str(ParallelLayout.from_config(parallel, world_size))
    reason = f"too much memory, most of it {misfit.part}"
    entry = _refuse(refused, reason, f"{name}: rank {misfit.rank}")
    if entry.least is None or misfit.needed < entry.least:
        entry.least, entry.example = misfit.needed, f"{name}: rank {misfit.rank}"


def _refuse(refused: dict[str, Refused], reason: str, example: str) -> Refused:
    entry = refused.setdefault(reason, Refused(example=example))
    entry.count += 1
    return entry

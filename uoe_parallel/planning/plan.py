"""The plan of a layout: what its ranks hold, compute and send, and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from uoe_parallel.analysis.flops import (
    Computation,
    ModelFlops,
    ParameterCounts,
    model_flops_per_token,
    parameter_counts,
)
from uoe_parallel.analysis.memory import StepMemory
from uoe_parallel.analysis.traffic import micro_batches
from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.config.faults import report
from uoe_parallel.config.schema import Precision, RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.layout import ZERO_STAGES, ParallelLayout, layout_faults, why_not
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.stage import (
    RECOMPUTES,
    Rank,
    representative_stages,
    simulated_stage,
    vocabulary,
    with_recompute,
    with_zero_stage,
)
from uoe_parallel.planning.time import StageTime, StepTime, step_time


@dataclass(frozen=True)
class StagePlan:
    """Of the first rank of a stage."""

    stage: int
    rank: int
    layers: range
    parameters: int
    """That the rank holds, before ZeRO cuts them."""
    memory: StepMemory
    """With the routes that are expected."""
    worst_memory: StepMemory
    """With those that give this rank the most rows."""
    recomputing: dict[str, StepMemory]
    """As `memory`, for each setting of training.recompute."""
    by_zero_stage: dict[int, StepMemory]
    """As `memory`, for each parallel.zero_stage that the layout goes with."""
    computations: list[Computation]
    """Of a micro-batch."""
    traffic: list[Transfer]
    """Of a step."""
    group_sizes: dict[str, int]
    time: StageTime


@dataclass(frozen=True)
class Plan:
    """Of a config on a world."""

    layout: ParallelLayout
    hardware: Hardware
    precision: Precision
    recompute: str
    micro_batches: int
    """Of a data-parallel rank in a step."""
    tokens: int
    """Of a step."""
    parameters: ParameterCounts
    flops: ModelFlops
    """Per token."""
    stages: list[StagePlan]
    """Those that `representative_stages` picks."""
    time: StepTime

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.peak)

    @property
    def slowest(self) -> StagePlan:
        """The stage that the others wait for."""
        return max(self.stages, key=lambda stage: stage.time.micro_batch)

    @property
    def needed(self) -> int:
        """Bytes of the fullest device."""
        return self.hardware.needed(self.fullest.memory.peak)

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.time.seconds

    @property
    def utilisation(self) -> float:
        """Share of all devices' peak that the model's own operations are."""
        return self._share_of_peak(self.flops.routed)

    @property
    def dense_equivalent(self) -> float:
        """What the utilisation would be of a dense twin that is as fast; can be more than 1."""
        return self._share_of_peak(self.flops.dense_twin)

    def _share_of_peak(self, flops_per_token: float) -> float:
        peak = self.layout.world_size * self.hardware.peak(self.precision)
        return flops_per_token * self.tokens_per_second / peak


def plan(config: RunConfig, world_size: int, hardware: Hardware) -> Plan:
    """Of `config`, which `load_config` has checked, on `world_size` devices.

    For a process that is in no process group. Raises UserError if the config does not run on so
    many ranks, or the hardware has no figure for its precision.
    """
    if faults := list(layout_faults(config, world_size)):
        raise UserError(report(f"the layout of {world_size} ranks", faults))
    hardware.peak(config.training.precision)
    layout = ParallelLayout.from_config(config.parallel, world_size)
    vocab_size = vocabulary(config)[1]
    number = micro_batches(config, layout)
    stages = [
        _stage(config, layout, stage, hardware) for stage in representative_stages(config, layout)
    ]
    return Plan(
        layout=layout,
        hardware=hardware,
        precision=config.training.precision,
        recompute=config.training.recompute,
        micro_batches=number,
        tokens=config.training.global_batch_size * config.model.sequence_length,
        parameters=parameter_counts(config, vocab_size),
        flops=model_flops_per_token(config, vocab_size),
        stages=stages,
        time=step_time([stage.time for stage in stages], layout.pipeline, number),
    )


def _stage(config: RunConfig, layout: ParallelLayout, stage: int, hardware: Hardware) -> StagePlan:
    built = simulated_stage(config, layout, stage, hardware)
    ranks = {name: Rank(built, with_recompute(config, name)) for name in RECOMPUTES}
    rank = ranks[config.training.recompute]
    zero = {n: with_zero_stage(config, n) for n in ZERO_STAGES}
    return StagePlan(
        stage=stage,
        rank=built.model.groups.rank,
        layers=built.model.stage_layers[stage],
        parameters=built.parameters,
        memory=rank.memory,
        worst_memory=rank.worst_memory,
        recomputing={name: other.memory for name, other in ranks.items()},
        by_zero_stage={
            n: Rank(built, changed).memory
            for n, changed in zero.items()
            if why_not(changed, layout.world_size) is None
        },
        computations=rank.computations,
        traffic=rank.traffic,
        group_sizes={name: route.size for name, route in built.routes.items()},
        time=rank.time,
    )

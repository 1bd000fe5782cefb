"""Sizes and ranks of every parallel axis: the only place that computes and checks them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from uoe_parallel.config.checks import PARALLEL_RULES
from uoe_parallel.config.faults import ABSENT, Fault
from uoe_parallel.config.schema import ParallelConfig, RunConfig

ZERO_STAGES = (0, 1, 2, 3)

_FIELDS = tuple(f"parallel.{name}" for name in ParallelConfig.model_fields)


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on every axis."""

    tensor: int
    data: int
    pipe: int
    expert: int
    expert_data: int


@dataclass(frozen=True)
class ParallelLayout:
    """How `world_size` ranks share a model.

    Rank = (pipe x data size + data) x tensor size + tensor, the order of megatron-core's groups
    and of DeepSpeed's pipeline topology: a tensor group is a run of neighbouring ranks, so that
    it stays inside a node, and stages are farthest apart. An expert group is a run of neighbouring
    tensor groups of one stage.
    """

    world_size: int
    tensor: int
    pipeline: int
    expert: int
    sequence_parallel: bool
    zero_stage: int

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> ParallelLayout:
        """The layout of a config that `layout_faults` found fit for `world_size` ranks."""
        assert world_size % (parallel.tensor * parallel.pipeline) == 0
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            expert=parallel.expert_size,
            sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
            zero_stage=parallel.zero_stage,
        )

    @property
    def data(self) -> int:
        """Number of data-parallel replicas of the model."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Number of replicas of the experts that an expert group shares."""
        return self.world_size // (self.expert * self.pipeline)

    @property
    def has_wide_experts(self) -> bool:
        """Whether expert groups reach over data-parallel ranks."""
        return self.expert > self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        in_stage = rank % (self.world_size // self.pipeline)
        return Coordinates(
            tensor=rank % self.tensor,
            data=in_stage // self.tensor,
            pipe=rank // (self.world_size // self.pipeline),
            expert=in_stage % self.expert,
            expert_data=in_stage // self.expert,
        )

    def __str__(self) -> str:
        """Such as "tp2-sp-pp2-dp2-ep4-zero1", axes of one rank left out."""
        parts = [f"tp{self.tensor}"] if self.tensor > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"pp{self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"dp{self.data}"] if self.data > 1 else []
        parts += [f"ep{self.expert}"] if self.has_wide_experts else []
        return "-".join([*(parts or ["one"]), f"zero{self.zero_stage}"])


def layout_faults(config: RunConfig, world_size: int) -> Iterator[Fault]:
    """What keeps `config` from running on `world_size` ranks, next to the config's own faults.

    Where the mix of axes is at fault, in the config or here, the last one names the nearest layout
    that works.
    """
    faults = list(_rank_faults(config, world_size))
    yield from faults
    if not (faults or any(fault for rule in PARALLEL_RULES for fault in rule(config))):
        return
    nearest = nearest_layout(config, world_size)
    if nearest is not None:
        given = config.parallel.model_dump()
        changes = [
            f"parallel.{name}={'null' if value is None else str(value).lower()}"
            for name, value in nearest.model_dump().items()
            if value != given[name]
        ]
        yield Fault(
            ("parallel", *_FIELDS),
            ABSENT,
            f"is not a layout that {world_size} ranks can run",
            f"the nearest that is: {' '.join(changes)}",
        )


def _rank_faults(config: RunConfig, world_size: int) -> Iterator[Fault]:
    """What depends on the number of ranks."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if world_size % (tensor * pipeline):
        if pipeline == 1:
            yield Fault(
                ("parallel.tensor", "parallel.pipeline"),
                tensor,
                f"does not divide the world size of {world_size} ranks",
                f"start a multiple of {tensor} ranks or set parallel.tensor to a divisor of "
                f"{world_size}",
            )
        else:
            yield Fault(
                ("parallel.pipeline", "parallel.tensor"),
                pipeline,
                f"times parallel.tensor = {tensor} does not divide the world size of "
                f"{world_size} ranks",
                f"start a multiple of {tensor * pipeline} ranks or use sizes whose product "
                f"divides {world_size}",
            )
        return
    data = world_size // (tensor * pipeline)
    if data * tensor % parallel.expert_size:
        yield Fault(
            ("parallel.expert", "parallel.tensor", "parallel.pipeline"),
            parallel.expert,
            f"does not divide the {data * tensor} ranks of a pipeline stage",
            f"use a multiple of parallel.tensor = {tensor} that does",
        )
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % micro == 0 and batch % (micro * data):
        yield Fault(
            (
                "training.global_batch_size",
                "training.micro_batch_size",
                "parallel.tensor",
                "parallel.pipeline",
            ),
            batch,
            f"is not a multiple of micro_batch_size x data-parallel size = {micro} x {data}",
            f"use a multiple of {micro * data}",
        )


def with_parallel(config: RunConfig, parallel: ParallelConfig) -> RunConfig:
    """`config` under another layout."""
    return config.model_copy(update={"parallel": parallel})


def why_not(config: RunConfig, world_size: int) -> Fault | None:
    """The first reason why the mix of axes of `config` does not run on `world_size` ranks."""
    faults = (fault for rule in PARALLEL_RULES for fault in rule(config))
    return next(faults, None) or next(_rank_faults(config, world_size), None)


def candidate_layouts(world_size: int) -> Iterator[ParallelConfig]:
    """Every mix of axes and ZeRO stages of `world_size` ranks, supported or not, once.

    Sequence parallelism is left on where there is one tensor rank, and so without effect.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tensor in divisors:
        for pipeline in (n for n in divisors if world_size // tensor % n == 0):
            in_stage = world_size // pipeline
            for expert in (n for n in divisors if n % tensor == 0 and in_stage % n == 0):
                for sequence_parallel in (True, False) if tensor > 1 else (True,):
                    for stage in ZERO_STAGES:
                        yield ParallelConfig(
                            tensor=tensor,
                            pipeline=pipeline,
                            expert=expert if expert > tensor else None,
                            sequence_parallel=sequence_parallel,
                            zero_stage=stage,
                        )


def nearest_layout(config: RunConfig, world_size: int) -> ParallelConfig | None:
    """The supported layout that is least unlike the config's, None if there is none at all."""
    wanted = config.parallel
    ordered = sorted(candidate_layouts(world_size), key=lambda other: _distance(wanted, other))
    fits = (p for p in ordered if why_not(with_parallel(config, p), world_size) is None)
    return next(fits, None)


def _distance(wanted: ParallelConfig, other: ParallelConfig) -> float:
    """Doublings of axis sizes between two layouts; a ZeRO stage or a switch costs less than one.

    The expert size counts by how much wider than the tensor group it is, so that the two move
    together.
    """

    def sizes(parallel: ParallelConfig) -> tuple[float, ...]:
        width = parallel.expert_size / parallel.tensor
        return tuple(map(math.log2, (parallel.tensor, parallel.pipeline, width)))

    apart = sum(abs(a - b) for a, b in zip(sizes(wanted), sizes(other), strict=True))
    apart += 0.1 * (wanted.tensor != other.tensor)  # rather one field than two
    apart += 0.25 * abs(wanted.zero_stage - other.zero_stage)
    return apart + 0.5 * (wanted.sequence_parallel != other.sequence_parallel)


def supported_layouts(config: RunConfig, world_size: int) -> dict[str, ParallelConfig]:
    """The layouts of `world_size` ranks under which `config` runs, by name."""
    return {
        str(ParallelLayout.from_config(parallel, world_size)): parallel
        for parallel in candidate_layouts(world_size)
        if why_not(with_parallel(config, parallel), world_size) is None
    }

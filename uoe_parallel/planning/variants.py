"""Ways to run a config: layouts with a micro-batch size and the recomputation that they need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from uoe_parallel.analysis.memory import StepMemory
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.traffic import micro_batches
from uoe_parallel.config import yaml_text
from uoe_parallel.config.schema import ParallelConfig, Recompute, RunConfig
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.layout import ParallelLayout, with_parallel
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.stage import (
    RECOMPUTES,
    Rank,
    Stage,
    first_rank,
    representative_stages,
)
from uoe_parallel.planning.time import StageTime, StepTime, step_time

Variant = tuple[ParallelConfig, int]
"""A layout and a micro-batch size."""


@dataclass(frozen=True)
class Choice:
    """What a search may change of a config."""

    parallel: ParallelConfig
    micro_batch_size: int
    recompute: Recompute

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this choice."""
        training = {"micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        return config.model_copy(
            update={
                "parallel": self.parallel,
                "training": config.training.model_copy(update=training),
            }
        )

    def as_yaml(self) -> str:
        """The sections and fields to put into the config's file."""
        training = {"micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        return yaml_text.dump({"parallel": self.parallel.model_dump(), "training": training})


@dataclass(frozen=True)
class Found:
    """A way that fits."""

    layout: ParallelLayout
    choice: Choice
    time: StepTime
    needed: int
    """Bytes of the fullest device."""


@dataclass(frozen=True)
class Misfit:
    """A rank that needs more than its device has, however much it recomputes."""

    needed: int
    rank: int
    part: str
    """The field of `StepMemory` that is the largest."""


def outcomes(
    config: RunConfig, world_size: int, hardware: Hardware, variants: Sequence[Variant]
) -> dict[Variant, Found | Misfit]:
    """Of each variant with the least recomputation that makes it fit.

    variants: of the same axes, of which ranks build the same models; of each layout the smallest
    micro-batches first.
    """
    ended: dict[Variant, Found | Misfit] = {}
    left: dict[Variant, Recompute] = dict.fromkeys(variants, RECOMPUTES[0])
    while left:
        sweep = _Sweep(config, world_size, hardware, left)
        ended |= sweep.outcomes()
        left = sweep.again
    return ended


class _Sweep:
    """One look at all stages of some variants."""

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        hardware: Hardware,
        variants: Mapping[Variant, Recompute],
    ) -> None:
        """variants: with the least recomputation that comes into question."""
        self.config, self.world_size, self.hardware = config, world_size, hardware
        self.recompute = dict(variants)
        self.misfits: dict[Variant, Misfit] = {}
        self.times: dict[Variant, list[StageTime]] = defaultdict(list)
        self.needed: dict[Variant, int] = defaultdict(int)
        self.again: dict[Variant, Recompute] = {}
        """Variants of which a stage needs more recomputation than those before it."""

    def outcomes(self) -> dict[Variant, Found | Misfit]:
        """Of all variants but those in `again`."""
        axes = with_parallel(self.config, next(iter(self.recompute))[0])
        layout = ParallelLayout.from_config(axes.parallel, self.world_size)
        for stage in representative_stages(axes, layout):
            with simulated_groups(layout, first_rank(layout, stage)) as groups:
                self._look_at(build_stage(axes, groups))
        fitting = self.recompute.keys() - self.misfits.keys() - self.again.keys()
        return self.misfits | {variant: self._found(variant) for variant in fitting}

    def _look_at(self, model: LanguageModel) -> None:
        """At one stage."""
        stage = Stage(model, self.hardware)
        too_large: dict[ParallelConfig, Misfit] = {}
        for variant, least in self.recompute.items():
            parallel = variant[0]
            if variant in self.misfits:
                continue
            if parallel in too_large:  # and with a larger micro-batch no smaller
                self._drop(variant, too_large[parallel])
                continue
            rank = self._least_recomputing(stage, variant)
            self.needed[variant] = max(self.needed[variant], rank.needed)
            if not rank.fits:
                part = _largest(rank.memory)
                too_large[parallel] = Misfit(rank.needed, model.groups.rank, part)
                self._drop(variant, too_large[parallel])
                continue
            found = rank.config.training.recompute
            if found != least and self.times[variant]:
                self.again[variant] = found
            self.recompute[variant] = found
            if variant not in self.again:
                self.times[variant].append(rank.time)

    def _drop(self, variant: Variant, misfit: Misfit) -> None:
        self.misfits[variant] = misfit
        self.again.pop(variant, None)

    def _least_recomputing(self, stage: Stage, variant: Variant) -> Rank:
        """The rank with the least recomputation that makes it fit, or with the most there is."""
        least = RECOMPUTES.index(self.recompute[variant])
        ranks = [
            Rank(stage, Choice(*variant, recompute).of(self.config))
            for recompute in RECOMPUTES[least:]
        ]
        if not ranks[0].states_fit:
            return ranks[-1]
        return next((rank for rank in ranks if rank.fits), ranks[-1])

    def _found(self, variant: Variant) -> Found:
        choice = Choice(*variant, self.recompute[variant])
        layout = ParallelLayout.from_config(choice.parallel, self.world_size)
        number = micro_batches(choice.of(self.config), layout)
        time = step_time(self.times[variant], layout.pipeline, number)
        return Found(layout, choice, time, self.needed[variant])


def _largest(memory: StepMemory) -> str:
    parts = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "moment"}
    return max(parts, key=lambda name: parts[name])

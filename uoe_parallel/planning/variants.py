"""Ways to run a config: layouts with a micro-batch size and the recomputation that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from uoe_parallel.analysis.memory import StepMemory
from uoe_parallel.analysis.traffic import micro_batches
from uoe_parallel.config import yaml_text
from uoe_parallel.config.schema import ParallelConfig, Recompute, RunConfig
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.planning.stage import RECOMPUTES, Rank, Stage
from uoe_parallel.planning.time import StepTime, step_time


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
    """Bytes of the fullest device, at the routes that are expected."""


@dataclass(frozen=True)
class Misfit:
    """A rank that needs more than its device has, however much it recomputes."""

    needed: int
    rank: int
    part: str
    """The field of `StepMemory` that is the largest."""


def fastest(
    config: RunConfig, parallel: ParallelConfig, sizes: Sequence[int], stages: Sequence[Stage]
) -> Found | Misfit:
    """The fastest way to run a layout.

    sizes: of micro-batches that come into question, in order. stages: of this layout, or of one
    that differs from it in the ZeRO stage alone.

    Larger micro-batches need no less memory. With as much recomputation, the time of a step is
    (m + p - 1) max(a + b x, h) for m = n / x micro-batches of x sequences, h of them the host's: it
    falls while the host is what counts and is convex in x from there on, so that once it grows it
    goes on growing.
    """
    best: Found | None = None
    last: Found | None = None
    for size in sizes:
        least = RECOMPUTES[0] if last is None else last.choice.recompute
        outcome = _outcome(config, Choice(parallel, size, least), stages)
        if isinstance(outcome, Misfit):
            return best or outcome
        if last is not None and outcome.time.seconds > last.time.seconds:
            if outcome.choice.recompute == least:
                break
        elif best is None or outcome.time.seconds < best.time.seconds:
            best = outcome
        last = outcome
    assert best is not None
    return best


def _outcome(config: RunConfig, choice: Choice, stages: Sequence[Stage]) -> Found | Misfit:
    """With the least recomputation, from the choice's own on, that makes it fit."""
    settings = RECOMPUTES[RECOMPUTES.index(choice.recompute) :]
    if not all(Rank(stage, choice.of(config)).states_fit for stage in stages):
        settings = RECOMPUTES[-1:]
    unfit: Rank | None = None
    for recompute in settings:
        choice = replace(choice, recompute=recompute)
        ranks = [Rank(stage, choice.of(config)) for stage in stages]
        unfit = next((rank for rank in ranks if not rank.fits), None)
        if unfit is None:
            return _found(choice, ranks)
    assert unfit is not None
    return Misfit(unfit.needed, unfit.model.groups.rank, _largest(unfit.memory))


def _found(choice: Choice, ranks: Sequence[Rank]) -> Found:
    config, groups = ranks[0].config, ranks[0].model.groups
    layout = ParallelLayout.from_config(choice.parallel, groups.layout.world_size)
    number = micro_batches(config, layout)
    time = step_time([rank.time for rank in ranks], layout.pipeline, number)
    return Found(layout, choice, time, max(rank.needed for rank in ranks))


def _largest(memory: StepMemory) -> str:
    parts = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "moment"}
    return max(parts, key=lambda name: parts[name])

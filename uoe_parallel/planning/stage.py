"""One rank of a layout: what it holds, computes and sends, and how long that takes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

from uoe_parallel.analysis.activations import Activations
from uoe_parallel.analysis.flops import Computation, micro_batch_flops
from uoe_parallel.analysis.memory import StepMemory, step_memory
from uoe_parallel.analysis.parts import StagePart
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.states import ModelStates, StateRules
from uoe_parallel.analysis.traffic import micro_batches, step_traffic
from uoe_parallel.analysis.transfer import Transfer, group_ranks
from uoe_parallel.analysis.work import Workload, expected_exchanges, expected_work, worst_work
from uoe_parallel.config.schema import Recompute, RunConfig
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.stages import stage_layers
from uoe_parallel.parallel.layout import ParallelLayout, with_parallel
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.time import Route, StageTime, Work, stage_time

_T = TypeVar("_T")

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the fastest to the one that keeps the least."""


def vocabulary(config: RunConfig) -> tuple[int, int]:
    """Ids that a model of this config reads, and their number padded."""
    used = num_model_ids(build_tokenizer(config.data.tokenizer), config.model.task)
    return used, padded_vocab_size(used, config.model.vocab_multiple)


def representative_stages(config: RunConfig, layout: ParallelLayout) -> list[int]:
    """The stages that differ in more than their place: first, last, and of those between the
    earliest, which holds the most micro-batches, for each number of layers of each kind."""
    classifies = config.model.task == "classification"
    vocab_size = 0 if classifies else vocabulary(config)[1]
    cuts = stage_layers(config, layout.pipeline, vocab_size)
    earliest: dict[tuple[tuple[bool, bool], ...], int] = {}
    for stage, layers in list(enumerate(cuts))[1:-1]:
        kinds = sorted((config.attention.routes(n), config.feed_forward.routes(n)) for n in layers)
        earliest.setdefault(tuple(kinds), stage)
    return sorted({0, layout.pipeline - 1, *earliest.values()})


def first_rank(layout: ParallelLayout, stage: int) -> int:
    """Of a stage: what another rank of it differs in is padding."""
    return stage * (layout.world_size // layout.pipeline)


class Stage:
    """One rank's stage of a simulated world, and what does not depend on all of a config, which is
    found once."""

    def __init__(self, model: LanguageModel, hardware: Hardware) -> None:
        """For as long as the simulated world is there; a stage outlives it."""
        self.model, self.hardware = model, hardware
        self.on_cuda = hardware.device == "cuda"
        self.routes = {name: Route.of(r, hardware) for name, r in group_ranks(model.groups).items()}
        self.parameters = sum(param.numel() for param in model.parameters())
        self._found: dict[Hashable, Any] = {}

    def once(self, find: Callable[[LanguageModel, RunConfig], _T], config: RunConfig) -> _T:
        """`find(model, config)`, which must not depend on the ZeRO stage."""
        training = config.training
        key = find, training.micro_batch_size, training.recompute
        if key not in self._found:
            self._found[key] = find(self.model, config)
        return self._found[key]

    def computations(self, model: LanguageModel, config: RunConfig) -> list[Computation]:
        """Of a micro-batch."""
        work = self.once(expected_work, config)
        return micro_batch_flops(model, config, work, pads=not self.on_cuda)

    def activations(self, model: LanguageModel, config: RunConfig) -> StagePart:
        """Of a micro-batch."""
        work = self.once(expected_work, config)
        return Activations(model, config, work, on_cuda=self.on_cuda).stage()

    def rules(self, config: RunConfig) -> StateRules:
        """How DeepSpeed keeps its parameters, which its ZeRO stage decides."""
        zero_stage = config.parallel.zero_stage
        # ZeRO 3 gathers weights for what is recomputed.
        key = zero_stage, config.training.recompute if zero_stage == 3 else None
        if key not in self._found:
            self._found[key] = StateRules(self.model, config)
        return self._found[key]


def simulated_stage(
    config: RunConfig, layout: ParallelLayout, stage: int, hardware: Hardware
) -> Stage:
    """Of the first rank of a stage, for a process that is in no process group."""
    with simulated_groups(layout, first_rank(layout, stage)) as groups:
        return Stage(build_stage(config, groups), hardware)


class Rank:
    """The estimates of one rank under a config, each made when it is asked for."""

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        """config: may differ from that which the stage was built with in ZeRO stage, micro-batch
        size and recomputation."""
        self.stage, self.model, self.config = stage, stage.model, config
        self.hardware, self.on_cuda = stage.hardware, stage.on_cuda

    @property
    def work(self) -> Workload:
        """Expected, of a micro-batch."""
        return self.stage.once(expected_work, self.config)

    @cached_property
    def states(self) -> ModelStates:
        return self.stage.rules(self.config).states

    @cached_property
    def memory(self) -> StepMemory:
        """With expected routes."""
        part = self.stage.once(self.stage.activations, self.config)
        return self._memory(self.work, part)

    @property
    def needed(self) -> int:
        """Bytes of its device."""
        return self.hardware.needed(self.memory.peak)

    @property
    def states_fit(self) -> bool:
        """Whether weights and optimizer state leave anything, which is quickly found."""
        held = self.states.weights + self.states.optimizer
        return self.hardware.needed(held) <= self.hardware.memory

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory

    @cached_property
    def worst_memory(self) -> StepMemory:
        """With the routes that give this rank the most."""
        return self._memory(worst_work(self.model, self.config))

    def _memory(self, work: Workload, stage: StagePart | None = None) -> StepMemory:
        rules = self.stage.rules(self.config)
        return step_memory(
            self.model, self.config, work, on_cuda=self.on_cuda, stage=stage, rules=rules
        )

    @property
    def computations(self) -> list[Computation]:
        """Of a micro-batch."""
        return self.stage.once(self.stage.computations, self.config)

    @cached_property
    def traffic(self) -> list[Transfer]:
        """Of a step."""
        exchanges = self.stage.once(expected_exchanges, self.config)
        return step_traffic(self.model, self.config, exchanges, self.stage.rules(self.config))

    @cached_property
    def time(self) -> StageTime:
        rules, plain = self.stage.rules(self.config), with_recompute(self.config, "none")
        work = Work(
            computations=self.computations,
            kept=self.stage.once(self.stage.activations, plain).kept.total,
            weights=rules.element * self.stage.parameters,
            layers=queued_layers(self.model),
            states=self.states,
            traffic=self.traffic,
            micro_batches=micro_batches(self.config, self.model.groups.layout),
            overlaps=bool(rules.zero.overlap_comm),
        )
        return stage_time(work, self.stage.routes, self.hardware, self.config.training.precision)


def queued_layers(model: LanguageModel) -> float:
    """What a host has to queue for a stage's layers, in layers with both blocks routed: of dense
    blocks about a quarter of the operations."""
    blocks = [b for layer in model.layers.values() for b in (layer.attention, layer.feed_forward)]
    return sum(0.5 if isinstance(block, RoutedBlock) else 0.125 for block in blocks)


def with_recompute(config: RunConfig, recompute: Recompute) -> RunConfig:
    training = config.training.model_copy(update={"recompute": recompute})
    return config.model_copy(update={"training": training})


def with_zero_stage(config: RunConfig, stage: int) -> RunConfig:
    return with_parallel(config, config.parallel.model_copy(update={"zero_stage": stage}))

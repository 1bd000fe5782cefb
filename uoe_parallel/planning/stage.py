"""One rank of a layout: what it holds, computes and sends, and how long that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from uoe_parallel.analysis.activations import Activations
from uoe_parallel.analysis.flops import Computation, micro_batch_flops
from uoe_parallel.analysis.memory import StepMemory, step_memory
from uoe_parallel.analysis.states import StateRules
from uoe_parallel.analysis.traffic import micro_batches, step_traffic
from uoe_parallel.analysis.transfer import Transfer, group_ranks
from uoe_parallel.analysis.work import Workload, expected_exchanges, expected_work, worst_work
from uoe_parallel.config.schema import Recompute, RunConfig
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.model.stages import stage_layers
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.time import Route, StageTime, Work, stage_time

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


class Rank:
    """The estimates of one rank, each made when it is asked for."""

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        hardware: Hardware,
        routes: Mapping[str, Route] | None = None,
    ) -> None:
        """model: its stage, in the groups of a simulated world that is still open. config:
        may differ from that which the model was built with in ZeRO stage, micro-batch size and
        recomputation. routes: as `routes_of` gives them, if they are there already."""
        self.model, self.config, self.hardware = model, config, hardware
        self._routes = routes
        self.on_cuda = hardware.device == "cuda"

    @property
    def routes(self) -> Mapping[str, Route]:
        return self._routes or routes_of(self.model, self.hardware)

    @cached_property
    def work(self) -> Workload:
        """Expected, of a micro-batch."""
        return expected_work(self.model, self.config)

    @cached_property
    def memory(self) -> StepMemory:
        """With expected routes."""
        return self._memory(self.work)

    @property
    def needed(self) -> int:
        """Bytes of its device."""
        return self.hardware.needed(self.memory.peak)

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory

    @cached_property
    def worst_memory(self) -> StepMemory:
        """With the routes that give this rank the most."""
        return self._memory(worst_work(self.model, self.config))

    def _memory(self, work: Workload) -> StepMemory:
        _set_recompute(self.model, self.config.training.recompute)
        return step_memory(self.model, self.config, work, on_cuda=self.on_cuda)

    @cached_property
    def computations(self) -> list[Computation]:
        """Of a micro-batch."""
        return micro_batch_flops(self.model, self.config, self.work, pads=not self.on_cuda)

    @cached_property
    def traffic(self) -> list[Transfer]:
        """Of a step."""
        _set_recompute(self.model, self.config.training.recompute)
        return step_traffic(self.model, self.config, expected_exchanges(self.model, self.config))

    @cached_property
    def time(self) -> StageTime:
        rules = StateRules(self.model, self.config)
        work = Work(
            computations=self.computations,
            kept=self._kept(),
            weights=rules.element * sum(p.numel() for p in self.model.parameters()),
            states=rules.model_states(),
            traffic=self.traffic,
            micro_batches=micro_batches(self.config, self.model.groups.layout),
            overlaps=bool(rules.zero.overlap_comm),
        )
        return stage_time(work, self.routes, self.hardware, self.config.training.precision)

    def _kept(self) -> int:
        """Bytes that a micro-batch would keep without recomputation."""
        plain = with_recompute(self.config, "none")
        _set_recompute(self.model, "none")
        stage = Activations(self.model, plain, self.work, on_cuda=self.on_cuda).stage()
        return stage.kept.total


def routes_of(model: LanguageModel, hardware: Hardware) -> dict[str, Route]:
    """Of all groups of this rank."""
    return {name: Route.of(r, hardware) for name, r in group_ranks(model.groups).items()}


def _set_recompute(model: LanguageModel, recompute: Recompute) -> None:
    # Building a stage takes longer than everything that is asked of it.
    for layer in model.layers.values():
        assert isinstance(layer, TransformerBlock)
        layer.recompute = recompute == "full"
        for block in (layer.attention, layer.feed_forward):
            experts: Any = block.experts
            experts.recompute = recompute == "selective"
            if isinstance(block, RoutedBlock):
                block.recompute = experts.recompute


def with_recompute(config: RunConfig, recompute: Recompute) -> RunConfig:
    training = config.training.model_copy(update={"recompute": recompute})
    return config.model_copy(update={"training": training})

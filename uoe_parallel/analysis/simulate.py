"""One rank of a world of any size, built in this process alone: groups, shards, memory, traffic.

The code is that of a run, on torch's fake process group, which starts without peers, and on meta
tensors, which have shapes and no data. What depends on other ranks' routes has to be given or
drawn: a fake exchange tells a rank nothing but what it said itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.exchange import ExchangeSizes, sample_exchange
from uoe_parallel.analysis.states import ModelStates, StateRules
from uoe_parallel.analysis.traffic import (
    Exchanges,
    blocks_that_exchange,
    micro_batches,
    step_traffic,
)
from uoe_parallel.analysis.transfer import Transfer, group_ranks
from uoe_parallel.config.faults import report
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.errors import UserError
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.builder import LayerBuilder
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults
from uoe_parallel.parallel.sharding import Shard, is_wide, named_shards, partition_dim

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class ParameterPlace:
    """A parameter of a rank's stage."""

    name: str
    shard: Shard
    cut_over: str | None
    """The group that shares it, None where every rank of the tensor group holds it whole."""
    reduced_over: str
    """The group that holds the same part, over which its gradient is averaged."""


@dataclass(frozen=True)
class Simulation:
    """What one rank of a world is, has and sends."""

    layout: ParallelLayout
    rank: int
    groups: dict[str, tuple[int, ...]]
    """Ranks of its groups; see `transfer.group_ranks`."""
    layers: range
    """Transformer layers of its stage."""
    micro_batches: int
    """Of a step."""
    shapes: dict[str, tuple[int, ...]]
    """What a micro-batch brings to this stage: "token ids" to the first one, "hidden states"
    between blocks, "logits" on the last."""
    parameters: list[ParameterPlace]
    states: ModelStates
    traffic: list[Transfer]
    """Of one optimizer step."""


@contextmanager
def simulated_groups(layout: ParallelLayout, rank: int) -> Iterator[ParallelGroups]:
    """The groups of rank `rank` of `layout`, for the life of the block.

    For a process that is in no process group, and gets none that could send anything. They are
    those that `start_groups` has Megatron start, and only the rank's own.
    """
    assert not dist.is_initialized(), "a simulated world needs a process without a process group"
    use_device(0)
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size)
    try:
        yield _own_groups(layout, rank)
    finally:
        dist.destroy_process_group()


def _own_groups(layout: ParallelLayout, rank: int) -> ParallelGroups:
    place, in_stage = layout.coordinates(rank), layout.world_size // layout.pipeline
    stage = range(place.pipe * in_stage, (place.pipe + 1) * in_stage)

    def start(ranks: range) -> ProcessGroup:
        group = dist.new_group(list(ranks), backend="fake", use_local_synchronization=True)
        assert isinstance(group, ProcessGroup)
        return group

    def neighbours(size: int) -> range:
        return range(rank - rank % size, rank - rank % size + size)

    world = dist.group.WORLD
    assert world is not None
    tensor, data = start(neighbours(layout.tensor)), start(stage[place.tensor :: layout.tensor])
    wide = layout.has_wide_experts
    return ParallelGroups(
        layout=layout,
        rank=rank,
        world=world,
        tensor=tensor,
        data=data,
        pipe=start(range(rank % in_stage, layout.world_size, in_stage)),
        expert=start(neighbours(layout.expert)) if wide else tensor,
        expert_data=start(stage[place.expert :: layout.expert]) if wide else data,
    )


def build_stage(
    config: RunConfig, groups: ParallelGroups, vocab_size: int | None = None
) -> LanguageModel:
    """This rank's stage on meta tensors. `vocab_size` is the number of ids that it reads; the
    tokenizer is built for it if none is given."""
    if vocab_size is None:
        vocab_size = num_model_ids(build_tokenizer(config.data.tokenizer), config.model.task)
    with torch.device("meta"):
        return LanguageModel(
            config,
            groups,
            vocab_size=padded_vocab_size(vocab_size, config.model.vocab_multiple),
            used_vocab_size=vocab_size,
            backend=LoopBackend(),
            build_layer=_Layers(config),
        )


class _Layers:
    """Builds layers without data: the first of a kind, and others as copies, which is faster."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.built: dict[tuple[bool, bool], TransformerBlock] = {}

    def __call__(self, builder: LayerBuilder, layer: int) -> TransformerBlock:
        kind = self.config.attention.routes(layer), self.config.feed_forward.routes(layer)
        if kind in self.built:
            return _twin(self.built[kind])
        self.built[kind] = TransformerBlock(builder, layer)
        return self.built[kind]


def _twin(module: _Module) -> _Module:
    """A copy with modules and parameters of its own; all else is the same."""
    twin = copy(module)
    twin._modules = {name: child and _twin(child) for name, child in module._modules.items()}
    twin._parameters = {name: _alike(param) for name, param in module._parameters.items()}
    return twin


def _alike(param: nn.Parameter | None) -> nn.Parameter | None:
    if param is None:
        return None
    alike = nn.Parameter(param)
    vars(alike).update(vars(param))  # the marks of Megatron and DeepSpeed
    return alike


def simulate_world(
    config: RunConfig,
    world_size: int,
    rank: int = 0,
    *,
    exchanges: Exchanges | None = None,
    seed: int = 0,
    skew: float = 0.0,
    vocab_size: int | None = None,
) -> Simulation:
    """Rank `rank` of a run of `config` on `world_size` ranks.

    exchanges: sizes of the routed blocks' exchanges, as recorded. Without them, choices are drawn
    with `seed` and `skew` (see `sample_exchange`), once per block: every micro-batch of the step is
    taken to send what the first does. vocab_size: see `build_stage`.

    Raises UserError if the config does not run on so many ranks, or there is no such rank.
    """
    if faults := list(layout_faults(config, world_size)):
        raise UserError(report(f"the layout of {world_size} ranks", faults))
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not in a world of {world_size}; use 0 to {world_size - 1}")
    layout = ParallelLayout.from_config(config.parallel, world_size)
    with simulated_groups(layout, rank) as groups:
        model = build_stage(config, groups, vocab_size)
        if exchanges is None:
            exchanges = sample_exchanges(model, config, seed, skew)
        return Simulation(
            layout=layout,
            rank=rank,
            groups=group_ranks(groups),
            layers=model.stage_layers[groups.stage],
            micro_batches=micro_batches(config, layout),
            shapes=_shapes(model, config),
            parameters=parameter_places(model),
            states=StateRules(model, config).states,
            traffic=step_traffic(model, config, exchanges),
        )


def sample_exchanges(
    model: LanguageModel, config: RunConfig, seed: int, skew: float = 0.0
) -> Exchanges:
    """Drawn choices for each block of this stage, the same in all micro-batches."""
    tokens = config.training.micro_batch_size * config.model.sequence_length // model.num_shards

    def sample(name: str, block: RoutedBlock) -> ExchangeSizes:
        return sample_exchange(
            tokens=tokens,
            num_experts=block.router.num_experts,
            top_k=block.routing.chosen_experts,
            shared=block.router.shared,
            rank=block.expert_group.rank(),
            num_ranks=block.expert_group.size(),
            seed=seed,
            name=name,
            skew=skew,
        )

    number = micro_batches(config, model.groups.layout)
    blocks = blocks_that_exchange(model).items()
    return {name: [sample(name, block)] * number for name, block in blocks}


def parameter_places(model: LanguageModel) -> list[ParameterPlace]:
    """Every parameter of this rank's stage."""
    return [
        ParameterPlace(
            name=name,
            shard=shard,
            cut_over=_cut_over(param),
            reduced_over="expert_data" if is_wide(param) else "data",
        )
        for name, param, shard in named_shards(model, model.groups)
    ]


def _shapes(model: LanguageModel, config: RunConfig) -> dict[str, tuple[int, ...]]:
    length, batch = config.model.sequence_length, config.training.micro_batch_size
    shapes: dict[str, tuple[int, ...]] = {}
    if model.groups.is_first_stage:
        shapes["token ids"] = (batch, length)
    shapes["hidden states"] = (length // model.num_shards, batch, config.model.hidden_size)
    if isinstance(model.head, VocabularyHead):
        shapes["logits"] = (length, batch, model.head.logits.output_size_per_partition)
    elif model.head is not None:
        shapes["logits"] = (batch, len(model.head.bias))
    return shapes


def _cut_over(param: torch.nn.Parameter) -> str | None:
    if partition_dim(param) is None:
        return None
    return "expert" if is_wide(param) else "tensor"

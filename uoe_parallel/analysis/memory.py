"""What one rank holds at the moment of a training step at which it holds the most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import nn

from uoe_parallel.analysis.activations import Activations
from uoe_parallel.analysis.buffers import Held, StepBuffers
from uoe_parallel.analysis.parts import Bytes, StagePart
from uoe_parallel.analysis.states import StateRules
from uoe_parallel.analysis.traffic import micro_batches
from uoe_parallel.analysis.work import Workload
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.block import DenseBlock
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel

Moment = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment of a step when the most are held, by what they are for."""

    moment: Moment
    weights: int
    """In the type of the passes, as they lie between steps."""
    gradients: int
    optimizer: int
    """Moments, and masters where there are any."""
    buffers: int
    """DeepSpeed's: reduce buckets, flat copies, weights gathered for use; and what it and Megatron
    receive hidden states in."""
    activations: int
    """Kept for the backward passes of all micro-batches in flight, logits and losses included."""
    dispatch: int
    """Rows on their way to experts and back, and what is kept of those of other ranks."""
    working: int
    """What the block that computes at this moment, or AdamW, needs on top."""

    @property
    def peak(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.buffers
            + self.activations
            + self.dispatch
            + self.working
        )


def step_memory(
    model: LanguageModel,
    config: RunConfig,
    work: Workload,
    micro_batches_in_flight: int | None = None,
    *,
    on_cuda: bool = True,
    stage: StagePart | None = None,
    rules: StateRules | None = None,
) -> StepMemory:
    """Of training `model`, a rank's stage as it is before DeepSpeed gets it, on meta too.

    work: of each of its routed blocks in one micro-batch. micro_batches_in_flight: whose
    activations are held at a time; None for those of DeepSpeed's schedule (1F1B). on_cuda: whether
    it runs on a GPU, whose kernels keep less than a CPU's. stage, rules: what `Activations` and
    `StateRules` have for the same, if that is known.
    """
    number = micro_batches(config, model.groups.layout)
    if micro_batches_in_flight is None:
        micro_batches_in_flight = min(model.groups.pipe.size() - model.groups.stage, number)
    stage = stage or Activations(model, config, work, on_cuda=on_cuda).stage()
    others = stage.kept.times(micro_batches_in_flight - 1)
    rules = rules or StateRules(model, config)
    buffers = StepBuffers(rules, is_accumulated=number > 1)
    always = _messages(model, config, rules.element, micro_batches_in_flight)

    def moment(name: Moment, held: Bytes, of_deepspeed: Held) -> StepMemory:
        return StepMemory(
            moment=name,
            weights=rules.states.weights,
            gradients=of_deepspeed.gradients,
            optimizer=rules.states.optimizer,
            buffers=of_deepspeed.buffers + always,
            activations=held.activations,
            dispatch=held.dispatch,
            working=held.working,
        )

    moments = [moment("forward", others + stage.forward, buffers.forward())]
    gradients, buffered = buffers.backward(stage.points)
    most = int((stage.points.held.sum(axis=1) + gradients + buffered).argmax())
    of_passes = others + Bytes(*stage.points.held[most].tolist())
    of_deepspeed = Held(int(gradients[most]), int(buffered[most]))
    moments.append(moment("backward", of_passes, of_deepspeed))
    moments += [moment("optimizer", Bytes(), held) for held in buffers.optimizer()]
    return max(moments, key=lambda moment: moment.peak)


def _messages(
    model: LanguageModel, config: RunConfig, element: int, micro_batches_in_flight: int
) -> int:
    """Bytes of what libraries keep to receive hidden states in: Megatron for those of all shards,
    DeepSpeed for those of other stages."""
    groups = model.groups
    tokens = config.training.micro_batch_size * config.model.sequence_length
    whole = tokens * config.model.hidden_size * element
    shard = whole // model.num_shards
    gathers = any(map(_gathers, _outside_of_routed(model)))
    size = whole if model.sequence_parallel and gathers else 0
    if groups.pipe.size() == 1:
        return size
    slots = max(2, micro_batches_in_flight)
    if not groups.is_first_stage:
        size += (1 + slots) * shard
    if not groups.is_last_stage:
        size += shard
    elif isinstance(model.head, VocabularyHead):  # logits of passes that are over
        size += (slots - 1) * tokens * model.head.logits.output_size_per_partition * element
    return size


def _outside_of_routed(model: LanguageModel) -> Iterator[nn.Module]:
    """What has linears and is no routed block."""
    if model.head is not None:
        yield model.head
    for layer in model.layers.values():
        yield from (block for block in layer.children() if type(block) is DenseBlock)


def _gathers(module: nn.Module) -> bool:
    """Whether it has a linear that gathers the tokens of all shards."""
    return any(isinstance(part, ColumnParallelLinear) for part in module.modules())

"""The model as stages of DeepSpeed's pipeline, which owns their schedule (1F1B)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.errors import UserError
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.embedding import Embedding
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.relay import relay, relay_to_all
from uoe_parallel.parallel.deepspeed_groups import topology
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import during
from uoe_parallel.training.distillation import compare, teaching
from uoe_parallel.training.engine import TrainingEngine
from uoe_parallel.training.timers import StepTimer

Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


class PipelineTrainingEngine(TrainingEngine):
    """As `TrainingEngine`, for a model cut into stages."""

    def _module(self) -> nn.Module:
        # The list of layers talks before `deepspeed.initialize` would have seen to it.
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        return LanguageModelPipeline(self.model, self._loss)

    def _model_parallel_unit(self) -> None:
        """The pipeline's own grid is one."""

    def _loss(self, logits: Tensor, labels_and_mask: tuple[Tensor, Tensor]) -> Tensor:
        """A micro-batch's part of the step's loss, on the last stage."""
        labels, mask = labels_and_mask
        with during("forward"):
            teacher = next(self._teachers)
            if teacher is None:
                losses = self.model.losses(logits, labels).unsqueeze(0)
            else:
                temperature = self.config.distillation.temperature
                losses = compare(self.model, logits, teacher, labels, temperature)
            return self._minimized(losses, mask) * self._scale

    def _run(self, batches: list[MicroBatch], scale: float, timer: StepTimer) -> None:
        # DeepSpeed's pipeline divides by the number of micro-batches.
        self._scale = scale * len(batches)
        with timer.part("pipeline"):
            self._teachers = iter([self._teacher(batch) for batch in batches])
            self.deepspeed.module.documents = iter([batch.documents for batch in batches])
            self.deepspeed.train_batch(
                iter([(batch.tokens, (batch.labels, batch.loss_mask)) for batch in batches])
            )

    def _teacher(self, batch: MicroBatch) -> Tensor | None:
        """Its logits on the last stage, which keeps them of all micro-batches of a step; None on
        others, and without one."""
        if self.config.distillation.weight == 0:
            return None
        with teaching(self.model), during("forward"):
            return relay(self.model, batch.tokens, batch.documents)

    def judged(self, batch: MicroBatch) -> tuple[Tensor, Tensor] | None:
        logits = relay(self.model, batch.tokens, batch.documents)
        return None if logits is None else self.model.judge(logits, batch.labels)

    def logits(self, tokens_BS: Tensor, memory: DecodingMemory | None = None) -> Tensor:
        return relay_to_all(self.model, tokens_BS, memory)


def build_engine(
    model: LanguageModel, config: RunConfig, groups: ParallelGroups, device: torch.device
) -> TrainingEngine:
    """The engine that suits the number of stages. Raises UserError on every rank if there is
    nothing to train on one of them."""
    if config.training.trains == "routers":
        _check_routers(model.stage_layers, config)
    kind = TrainingEngine if groups.layout.pipeline == 1 else PipelineTrainingEngine
    return kind(model, config, groups, device)


def _check_routers(stages: Sequence[range], config: RunConfig) -> None:
    routed = {int(block.split(".")[1]) for block in config.routed_blocks}
    for number, layers in enumerate(stages):
        if routed.isdisjoint(layers):
            raise UserError(
                f'training.trains = "routers" leaves pipeline stage {number} nothing to train: no '
                f"layer of {layers.start} to {layers.stop - 1} is routed; use a smaller "
                f"parallel.pipeline than {len(stages)}, or route layers of every stage"
            )


class LanguageModelPipeline(PipelineModule):
    """The layers of a `LanguageModel` as DeepSpeed wants them: one list on all ranks, of which each
    stage has its part. The parameters are the model's own, under other names."""

    def __init__(self, model: LanguageModel, loss: Loss) -> None:
        ends = [layers.stop for layers in model.stage_layers]
        # The list is the embedding, the transformer's layers, the final norm and the head.
        self._bounds = [0, *(1 + end for end in ends[:-1]), ends[-1] + 3]
        self.documents: Iterator[Tensor | None] = iter(())
        """Of the micro-batches whose forward passes are still to come, in their order."""
        with redirect_stdout(io.StringIO()):  # it tells rank 0's user about seeds and layers
            super().__init__(_listed(model), topology=topology(model.groups.layout), loss_fn=loss)
        self._stage = model.stage

    def forward(self, forward_input: Tensor) -> Tensor:
        # As DeepSpeed would call one layer after the other, but with what tokens alone can tell:
        # every rank has read them, so it need not be sent from stage to stage.
        with during("forward"):
            return self._stage(forward_input, next(self.documents))

    def _partition_layers(self, method: str = "") -> None:
        # DeepSpeed can weigh layers by their parameters only, of which a routed layer uses a part.
        self.parts = self._bounds
        self._set_bounds(*self._bounds[self.stage_id : self.stage_id + 2])


def _listed(model: LanguageModel) -> list[nn.Module | LayerSpec]:
    absent = LayerSpec(nn.Identity)  # on another stage, and never built
    numbers = map(str, range(model.num_layers))
    present = dict(model.layers.items())
    layers = [present.get(number, absent) for number in numbers]
    if model.tied:
        first, last = _TiedEmbedding(model), _TiedEmbedding(model)
    else:
        first, last = model.embedding or absent, model.head or absent
    return [first, *layers, model.final_norm or absent, last]


class _TiedEmbedding(TiedLayerSpec):
    """An embedding that was built already, on the first stage and on the last."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__("embedding", Embedding, tied_weight_attr="tokens.weight")
        self._embedding = model.embedding

    def build(self, log: bool = False) -> Embedding:
        assert self._embedding is not None
        weight: Any = self._embedding.tokens.weight
        if not weight.requires_grad:
            weight._hp_grad = None  # which DeepSpeed asks for in bf16 whether it is trained or not
        return self._embedding

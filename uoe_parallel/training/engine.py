"""The model inside DeepSpeed's engine, which owns ZeRO, gradient averaging and steps."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError
from torch import Tensor, nn

from uoe_parallel.config.deepspeed import deepspeed_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.errors import UserError
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.deepspeed_groups import ModelParallelUnit, WideExpertGroups
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose, during
from uoe_parallel.parallel.sharding import is_wide
from uoe_parallel.training.anomalies import Anomaly, Guard
from uoe_parallel.training.clipping import GradientClipper
from uoe_parallel.training.distillation import Student, objective_of
from uoe_parallel.training.evaluation import Evaluation, loss_of_text
from uoe_parallel.training.metrics import Values
from uoe_parallel.training.optimizer import build_optimizer, parameter_groups, set_learning_rates
from uoe_parallel.training.routing_state import move_rules, reset_rules
from uoe_parallel.training.state import base_optimizer, create_moments
from uoe_parallel.training.timers import StepTimer


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    """Nats per label that counts."""
    gradient_norm: float
    """Of the whole model, before clipping."""
    learning_rate: float
    anomaly: Anomaly | None
    """Why the optimizer did not move, if it did not."""
    distillation: Values
    """Means per label that counts beside the loss, by the names of metrics."""


class TrainingEngine:
    """Optimizer steps on the sum over the labels that count divided by their global number.

    For a model of one stage; `PipelineTrainingEngine` does the same for several.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self.model = model.to(device)
        self.config = config
        self.objective = objective_of(config.distillation)
        self.groups = groups
        self.device = device
        optimizer, self.optimizer_name = build_optimizer(
            parameter_groups(model, config.training),
            config.training,
            device,
            config.parallel.zero_stage,
        )
        module = self._module()
        self._tell_of_wide_experts(module)
        # DeepSpeed's optimizer types vary by ZeRO stage and are not declared.
        try:
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, groups.layout.data),
                mpu=self._model_parallel_unit(),
                dist_init_required=False,
            )
        except (DeepSpeedConfigError, ValidationError) as error:
            # It reads the same config on every rank, before any collective.
            raise UserError(f"deepspeed: {error}; mend this section of the config") from error
        self.deepspeed: Any = engine
        if config.training.precision == "fp64":
            _reduce_in_fp64(self.deepspeed)
        create_moments(self.deepspeed)
        base = base_optimizer(self.deepspeed)
        limit = config.training.gradient_clipping
        self.clipper = GradientClipper(self.deepspeed, base, model, groups, limit)
        self.guard = Guard(config.anomalies)
        self._move = self.deepspeed._take_model_step
        self.deepspeed._take_model_step = self._judge_and_move

    def _module(self) -> nn.Module:
        """What DeepSpeed trains."""
        config = self.config.distillation
        return Student(self.model, config.temperature) if config.weight > 0 else self.model

    def _tell_of_wide_experts(self, module: nn.Module) -> None:
        wide = [param for param in self.model.parameters() if is_wide(param)]
        if any(param.requires_grad for param in wide):
            module.wide_expert_groups = WideExpertGroups(self.groups)
        elif wide:
            # DeepSpeed would miss their optimizer's groups, and only has to know who shares them.
            WideExpertGroups(self.groups).set_deepspeed_parallelism()

    def _model_parallel_unit(self) -> object:
        return ModelParallelUnit(self.groups)

    def logits(self, tokens_BS: Tensor, memory: DecodingMemory | None = None) -> Tensor:
        """Logits of the used vocabulary [B, S, V], the same on every rank. memory: as in
        `LanguageModel.hidden`."""
        return self.deepspeed(tokens_BS, memory=memory)

    def token_losses(self, batch: MicroBatch) -> Tensor:
        """What `objective` names of every label, nats, [K, *labels.shape], for a backward pass. For
        a model of one stage alone."""
        losses: Tensor = self.deepspeed(batch.tokens, batch.labels, batch.documents)
        return losses.reshape(-1, *batch.labels.shape)

    def judged(self, batch: MicroBatch) -> tuple[Tensor, Tensor] | None:
        """The losses and which predictions are right, both of the labels' shape; None where a later
        stage computes them."""
        return self.deepspeed(batch.tokens, batch.labels, batch.documents, judged=True)

    def count_valid_labels(self, batches: list[MicroBatch]) -> int:
        """Labels that count in this step's loss, over all data ranks."""
        counts = [batch.loss_mask.sum() for batch in batches]
        count = torch.stack(counts).sum()
        return int(comm.sum_over(count, self.groups.data, purpose=Purpose.VALID_TOKENS))

    def step(self, batches: list[MicroBatch], step: int, timer: StepTimer) -> StepResult:
        """One optimizer step (from 0) on this rank's micro-batches, already on the device.

        Where `guard` finds an anomaly, weights, optimizer and routing rules stay as they are.
        """
        self._step, self._valid_labels = step, max(self.count_valid_labels(batches), 1)
        self._sums_K = torch.zeros(len(self.objective), device=self.device, dtype=torch.float64)
        # DeepSpeed averages gradients over data ranks; a sum over all of them is wanted.
        scale = self.groups.layout.data / self._valid_labels
        rate = set_learning_rates(self.deepspeed.optimizer, step, self.config.training)
        self._run(batches, scale, timer)
        (loss, *others), norm, anomaly = self._judged
        if anomaly is None:
            move_rules(self.model.routed_blocks(), self.groups, self.device)
        else:
            reset_rules(self.model.routed_blocks())
        _, *names = self.objective
        return StepResult(loss, norm, rate, anomaly, dict(zip(names, others, strict=True)))

    def _run(self, batches: list[MicroBatch], scale: float, timer: StepTimer) -> None:
        """All passes, then `_judge_and_move`. `scale`: of the sum of losses."""
        for batch in batches:
            with timer.part("forward"), during("forward"):
                loss_sum = self._minimized(self.token_losses(batch), batch.loss_mask)
            with timer.part("backward"):
                self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            with timer.part("optimizer"):
                self.deepspeed.step()

    def _minimized(self, losses: Tensor, mask: Tensor) -> Tensor:
        """What a micro-batch adds to the sum that is minimized. losses: [K, *mask.shape], as
        `objective` names them; their sums are noted."""
        sums = [(values * mask).sum() for values in losses]
        self._sums_K += torch.stack(sums).detach()
        weighted = zip(self.objective.values(), sums, strict=True)
        return torch.stack([weight * total for weight, total in weighted if weight > 0]).sum()

    def _judge_and_move(self, *arguments: Any) -> None:
        """Stands in for DeepSpeed's `_take_model_step`: all ranks are here once in a step, with or
        without a pipeline, when gradients are averaged and nothing has moved."""
        sums, norm = self.clipper.measure(self._sums_K)
        means = [total / self._valid_labels for total in sums]
        anomaly = self.guard.judge(self._step, means[0], norm)
        with nullcontext() if anomaly is None else self.clipper.withheld():
            self._move(*arguments)
        self._judged = means, norm, anomaly

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> Evaluation:
        """Over all data ranks' batches, in evaluation mode."""
        self.deepspeed.eval()
        totals = torch.zeros(3, device=self.device, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.device)
            with during("forward"):
                judged = self.judged(batch)
            if judged is not None:
                for place, values in enumerate((*judged, 1)):
                    totals[place] += (values * batch.loss_mask).sum()
        self.deepspeed.train()
        over = (self.groups.data, self.groups.pipe)
        loss, correct, count = comm.sum_over(totals, *over, purpose=Purpose.EVALUATION)
        # Not a number where nothing counts, such as a text too short for a masked token.
        mean, accuracy = float(loss / count), float(correct / count)
        of_text = loss_of_text(self.config, mean)
        return Evaluation(self.config.model.task, mean, accuracy, of_text)


def _reduce_in_fp64(engine: Any) -> None:
    """Without ZeRO, DeepSpeed can do all else in fp64, and its config has no word for it."""
    engine.communication_data_type = torch.float64
    accelerator: Any = get_accelerator()
    dtypes = {*accelerator.supported_dtypes(), torch.float64}
    accelerator.supported_dtypes = lambda: list(dtypes)

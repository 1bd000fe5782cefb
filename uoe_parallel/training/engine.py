"""The model inside DeepSpeed's engine, which owns ZeRO, gradient averaging, clipping and steps."""

from __future__ import annotations

import logging
import math
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError
from torch import Tensor, nn

from uoe_parallel.config.deepspeed import deepspeed_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.errors import UserError
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.mpu import ModelParallelUnit
from uoe_parallel.parallel.sharding import partition_dim
from uoe_parallel.training.optimizer import build_optimizer, parameter_groups, set_learning_rates
from uoe_parallel.training.state import create_moments
from uoe_parallel.training.timers import StepTimer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainingEngine:
    """Optimizer steps on the sum over valid tokens divided by their global count."""

    def __init__(
        self, model: nn.Module, config: RunConfig, groups: ParallelGroups, device: torch.device
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self.config = config
        self.groups = groups
        self.device = device
        optimizer, self.optimizer_name = build_optimizer(
            parameter_groups(model, config.training),
            config.training,
            device,
            config.parallel.zero_stage,
        )
        # DeepSpeed's optimizer types vary by ZeRO stage and are not declared.
        try:
            engine, *_ = deepspeed.initialize(
                model=model.to(device),
                optimizer=optimizer,
                config=deepspeed_config(config, groups.layout.data),
                mpu=ModelParallelUnit(groups),
                dist_init_required=False,
            )
        except (DeepSpeedConfigError, ValidationError) as error:
            # It reads the same config on every rank, before any collective.
            raise UserError(f"deepspeed: {error}; mend this section of the config") from error
        self.deepspeed: Any = engine
        create_moments(self.deepspeed)

    def token_losses(self, batch: MicroBatch) -> Tensor:
        """Cross entropy of every token, fp32 nats [b, s]."""
        return self.deepspeed(batch.tokens, batch.labels)

    def count_valid_tokens(self, batches: list[MicroBatch]) -> int:
        """Tokens that count in this step's loss, over all data ranks."""
        counts = [batch.loss_mask.sum() for batch in batches]
        return int(comm.sum_over(torch.stack(counts).sum(), self.groups.data))

    def step(
        self, batches: list[MicroBatch], step: int, timer: StepTimer
    ) -> tuple[float, float, float]:
        """One optimizer step (from 0) on this rank's micro-batches, already on the device.

        Returns the loss in nats per token, the global gradient norm before clipping and the
        learning rate. A loss or a gradient norm that is not finite is returned as it is; with
        such a loss the weights are left as they were.
        """
        valid_tokens = self.count_valid_tokens(batches)
        # DeepSpeed averages gradients over data ranks; a sum over all of them is wanted.
        scale = self.groups.layout.data / max(valid_tokens, 1)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        rate = set_learning_rates(self.deepspeed.optimizer, step, self.config.training)
        loss, norm = math.nan, None
        for number, batch in enumerate(batches):
            with timer.part("forward"):
                loss_sum = (self.token_losses(batch) * batch.loss_mask).sum()
                total += loss_sum.detach()
            with timer.part("backward"):
                self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            if number == len(batches) - 1:
                loss = float(comm.sum_over(total, self.groups.data)) / max(valid_tokens, 1)
                if not math.isfinite(loss):
                    return loss, math.nan, rate
                norm = self._plain_gradient_norm()
            with timer.part("optimizer"):
                self.deepspeed.step()
        # DeepSpeed keeps its norm from the step itself.
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return loss, float(norm), rate

    def _plain_gradient_norm(self) -> float | None:
        """The norm of the averaged gradients where DeepSpeed keeps none: fp32 without ZeRO."""
        if self.config.parallel.zero_stage > 0 or self.config.training.precision != "fp32":
            return None
        squares = torch.zeros(2, device=self.device, dtype=torch.float64)
        for param in self.deepspeed.module.parameters():
            if param.grad is not None:
                squares[int(partition_dim(param) is not None)] += param.grad.double().square().sum()
        # What is whole on every tensor rank counts once.
        return float(squares[0] + comm.sum_over(squares[1], self.groups.tensor)) ** 0.5

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> float:
        """Loss in nats per valid token over all data ranks' batches, in evaluation mode."""
        self.deepspeed.eval()
        totals = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.device)
            totals[0] += (self.token_losses(batch) * batch.loss_mask).sum()
            totals[1] += batch.loss_mask.sum()
        self.deepspeed.train()
        loss_sum, tokens = comm.sum_over(totals, self.groups.data).tolist()
        return loss_sum / tokens

"""The global norm of the gradients, each parameter counted once, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.sharding import counts_once, replica_group

_EPS = 1e-6
"""Added to the norm before dividing by it, as DeepSpeed and torch do."""


class GradientClipper:
    """Measures the norm of every step's averaged gradients, and clips by it.

    DeepSpeed's own norms are true for ZeRO 3 alone: the others leave out experts or parameters
    of later pipeline stages, or reduce once per parameter group, whose number differs between
    stages. They are replaced where DeepSpeed asks for them; without such a place DeepSpeed's
    clipping is switched off and the gradients are scaled before AdamW sees them.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: Optimizer,
        model: nn.Module,
        groups: ParallelGroups,
        max_norm: float,
    ) -> None:
        """`optimizer` is the AdamW inside of `engine`; `max_norm` 0 does not clip."""
        self._engine = engine
        self._model = model
        self._groups = groups
        self._max_norm = max_norm
        self._norm = torch.zeros(())
        self._wrapper = engine.optimizer
        if engine.zero_optimization_partition_weights():
            return
        if isinstance(self._wrapper, DeepSpeedZeroOptimizer):
            self._wrapper.scaled_global_norm = self._measure
            return
        if self._wrapper is not optimizer:
            self._wrapper.clip_grad = 0.0
        engine._config.gradient_clipping = 0.0
        optimizer.register_step_pre_hook(self._clip)

    @property
    def norm(self) -> float:
        """The norm before clipping of the last step."""
        if self._engine.zero_optimization_partition_weights():
            return float(self._engine.get_global_grad_norm())
        # Two wrappers look first for gradients that are not finite, and don't ask for a norm then.
        return math.inf if getattr(self._wrapper, "overflow", False) else float(self._norm)

    def _clip(self, optimizer: Optimizer, *_: Any) -> None:
        norm = self._measure()
        if self._max_norm == 0:
            return
        factor = (self._max_norm / (norm + _EPS)).clamp(max=1.0)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(factor.to(param.grad.dtype))

    @torch.no_grad()
    def _measure(self, *_: Any, **__: Any) -> Tensor:
        """The norm, fp64. Collective over all ranks."""
        norms = [torch.zeros((), dtype=torch.float64, device=self._engine.device)] + [
            torch.linalg.vector_norm(gradient, dtype=torch.float64)
            for param, gradient in self._gradients()
            if counts_once(param, self._groups)
        ]
        total = torch.stack(norms).square().sum()
        self._norm = comm.sum_over(total, self._groups.world, purpose=Purpose.GRADIENT_NORM).sqrt()
        return self._norm

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Averaged gradients with their parameters; over the ranks that hold the same part of a
        parameter, each element comes once."""
        wrapper = self._wrapper
        if isinstance(wrapper, DeepSpeedZeroOptimizer):
            for number, params in enumerate(wrapper.params_in_partition):
                gradients = wrapper.averaged_gradients[number]
                own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
                yield from zip(params, own, strict=False)
            return
        for param, gradient in self._whole_gradients():
            if gradient is not None and replica_group(param, self._groups).rank() == 0:
                yield param, gradient

    def _whole_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        """Gradients as every replica holds them."""
        wrapper = self._wrapper
        if isinstance(wrapper, BF16_Optimizer):
            for params, gradients in zip(
                wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True
            ):
                yield from zip(params, gradients, strict=True)
        elif isinstance(wrapper, FP16_UnfusedOptimizer):
            for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                yield from ((p, m.grad) for p, m in zip(params, masters, strict=True))
        else:
            yield from ((param, param.grad) for param in self._model.parameters())

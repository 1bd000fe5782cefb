"""The global norm of the gradients, each parameter counted once, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.sharding import counts_once, replica_group

_EPS = 1e-6
"""Added to the norm before dividing by it, as DeepSpeed and torch do."""
_LARGEST_NORM = 1e18
"""What lies above counts as infinite: DeepSpeed's own checks of bf16 gradients square them in fp32,
and would skip such a step on some ranks alone."""


class GradientClipper:
    """Measures the norm of every step's averaged gradients, and clips by it.

    DeepSpeed's own norms leave out experts or parameters of later pipeline stages, or reduce once
    per parameter group, whose number differs between stages, and all are known only when there is
    no way back. They are replaced where DeepSpeed asks for them; without such a place DeepSpeed's
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
        self._optimizer: Any = optimizer
        self._model = model
        self._groups = groups
        self._max_norm = max_norm
        self._norm = torch.zeros(())
        self._wrapper = engine.optimizer
        if isinstance(self._wrapper, DeepSpeedZeroOptimizer_Stage3):
            self._wrapper._get_norm_groups = lambda: [self._norm.to(self._wrapper.device)]
        elif isinstance(self._wrapper, DeepSpeedZeroOptimizer):
            self._wrapper.scaled_global_norm = lambda *_, **__: self._norm
        else:
            if self._wrapper is not optimizer:
                self._wrapper.clip_grad = 0.0
            engine._config.gradient_clipping = 0.0
            optimizer.register_step_pre_hook(self._clip)

    @torch.no_grad()
    def measure(self, sums_K: Tensor) -> tuple[list[float], float]:
        """The sums of all data ranks' `sums_K`, fp64, of losses, and the norm of the gradients, for
        when they are averaged and the optimizer has not moved. Collective over all ranks, in one
        message.

        `sums_K` are equal on tensor ranks, and 0 on all pipeline stages but the last. Nothing of
        the result is finite if its like on any rank is not, also where another rank counts.
        """
        zero = torch.zeros((), dtype=torch.float64, device=sums_K.device)
        square = zero.clone()
        norms: dict[bool, list[Tensor]] = {True: [zero], False: [zero]}
        for gradient, counts in self._gradients():
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            norms[counts].append(norm.to(zero.device))
        for counts, values in norms.items():
            square += int(counts) * torch.stack(values).square().sum()
        own = torch.cat((int(self._groups.tensor_rank == 0) * sums_K, square.unsqueeze(0)))
        *totals, square = comm.sum_over(own, self._groups.world, purpose=Purpose.JUDGEMENT)
        self._norm = square.sqrt()
        norm = float(self._norm)
        return list(map(float, totals)), math.inf if norm > _LARGEST_NORM else norm

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """A block in which the optimizer may be told to step and does not: weights, masters,
        moments and AdamW's count keep their bits, while all else that DeepSpeed does in a step is
        done. The gradients become 0, so that no rank finds a fault in them that others do not."""
        for gradient, _ in self._gradients():
            gradient.zero_()
        self._norm = torch.zeros_like(self._norm)
        self._optimizer.step = lambda *_, **__: None
        try:
            yield
        finally:
            del self._optimizer.step

    def _clip(self, optimizer: Optimizer, *_: Any) -> None:
        if self._max_norm == 0:
            return
        factor = (self._max_norm / (self._norm + _EPS)).clamp(max=1.0)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(factor.to(param.grad.dtype))

    def _gradients(self) -> Iterator[tuple[Tensor, bool]]:
        """This rank's averaged gradients, or its part of them, and whether they count: over all
        ranks each element counts once."""
        wrapper = self._wrapper
        if isinstance(wrapper, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
            for param, gradient in self._partitions():
                yield gradient, counts_once(param, self._groups)
            return
        for param, gradient in self._whole_gradients():
            if gradient is not None:
                is_first = replica_group(param, self._groups).rank() == 0
                yield gradient, is_first and counts_once(param, self._groups)

    def _partitions(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Gradients that ZeRO has cut over replicas, this rank's part."""
        wrapper = self._wrapper
        if not isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            for number, params in enumerate(wrapper.params_in_partition):
                gradients = wrapper.averaged_gradients[number]
                own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
                yield from zip(params, own, strict=False)
            return
        for number, params in enumerate(wrapper.fp16_groups):
            if not wrapper.offload_optimizer:
                yield from zip(params, wrapper.averaged_gradients[number], strict=True)
                continue
            for param in params:
                group, start, size = wrapper.grad_position[wrapper.get_param_id(param)]
                masters: Any = wrapper.fp32_partitioned_groups_flat[group]
                yield param, masters.grad.narrow(0, start, size)

    def _whole_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        """Gradients as every replica holds them."""
        wrapper = self._wrapper
        if isinstance(wrapper, BF16_Optimizer):
            for params, gradients in zip(
                wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True
            ):
                yield from zip(params, gradients, strict=True)
        else:
            yield from ((param, param.grad) for param in self._model.parameters())

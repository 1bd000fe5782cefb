"""How far a model's predictions are from those of another one, with the vocabulary cut over ranks.

Shape suffixes, beside those of the package: V ids of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose


def vocab_parallel_divergence(
    student_SBV: Tensor, teacher_SBV: Tensor, temperature: float, group: ProcessGroup
) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of every token, nats [S, B], fp32 (fp64 of
    fp64 logits), the same on every rank of `group`.

    student_SBV, teacher_SBV: logits [S, B, V/P] of this rank's part of the vocabulary. The gradient
    is the student's alone. Maxima and sums are sent, [S, B], and no logits. Collective over
    `group`.
    """
    return _Divergence.apply(student_SBV, teacher_SBV, temperature, group)


class _Divergence(torch.autograd.Function):
    """Keeps its gradient, (softmax(student / T) - softmax(teacher / T)) / T, and no logits, which
    the cross entropy may overwrite."""

    @staticmethod
    def forward(
        ctx: Any,
        student_SBV: Tensor,
        teacher_SBV: Tensor,
        temperature: float,
        group: ProcessGroup,
    ) -> Tensor:
        precise = torch.promote_types(student_SBV.dtype, torch.float32)
        logits = [x_SBV.to(precise) / temperature for x_SBV in (student_SBV, teacher_SBV)]
        maxima_2SB = torch.stack([x_SBV.amax(-1) for x_SBV in logits])
        maxima_2SB = comm.max_over(maxima_2SB, group, purpose=Purpose.LOSS)
        for x_SBV, maximum_SB in zip(logits, maxima_2SB, strict=True):
            x_SBV -= maximum_SB.unsqueeze(-1)
        sums_2SB = torch.stack([x_SBV.exp().sum(-1) for x_SBV in logits])
        sums_2SB = comm.sum_over(sums_2SB, group, purpose=Purpose.LOSS)
        for x_SBV, sum_SB in zip(logits, sums_2SB, strict=True):
            x_SBV -= sum_SB.log().unsqueeze(-1)
        log_student_SBV, log_teacher_SBV = logits
        teacher_SBV = log_teacher_SBV.exp()
        own_SB = (teacher_SBV * (log_teacher_SBV - log_student_SBV)).sum(-1)
        ctx.save_for_backward(log_student_SBV.exp_().sub_(teacher_SBV).div_(temperature))
        ctx.dtype = student_SBV.dtype
        return comm.sum_over(own_SB, group, purpose=Purpose.LOSS)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_SBV,) = ctx.saved_tensors
        return (gradient_SBV * grad_outputs[0].unsqueeze(-1)).to(ctx.dtype), None, None, None

"""The divergence of a student from its teacher, with the vocabulary cut over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.harness import Ranks
from uoe_parallel.model.divergence import vocab_parallel_divergence

SHAPE = (3, 2, 12)
"""[S, B, V]"""


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits, far from zero, and a weight of each token."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        (100 + 4 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    return student, teacher, torch.rand(SHAPE[:2], generator=generator, dtype=torch.float64)


def divergence_and_gradient(dtype: torch.dtype, temperature: float) -> tuple[Tensor, Tensor]:
    """[S, B], and this rank's part [S, B, V/P] of the gradient of its weighted sum."""
    group = dist.group.WORLD
    assert group is not None
    student, teacher, weights = inputs(dtype)
    own, of_teacher = (x.chunk(group.size(), -1)[group.rank()] for x in (student, teacher))
    own = own.clone().requires_grad_()
    divergence = vocab_parallel_divergence(own, of_teacher, temperature, group)
    (divergence * weights).sum().backward()
    own.detach().fill_(0)  # as the cross entropy may
    assert own.grad is not None and own.grad.dtype == dtype
    return divergence.detach(), own.grad


@pytest.mark.parametrize(
    ("world", "dtype", "temperature", "tolerance"),
    [
        (1, torch.float64, 2.5, 1e-12),
        (2, torch.float64, 2.5, 1e-12),
        (2, torch.float64, 1.0, 1e-12),
        (2, torch.float32, 1.0, 2e-5),
        (2, torch.bfloat16, 1.0, 1e-2),
    ],
)
def test_value_and_gradient_are_those_of_torch_in_fp64(
    ranks: Ranks, world: int, dtype: torch.dtype, temperature: float, tolerance: float
) -> None:
    student, teacher, weights = inputs(dtype)
    student = student.double().requires_grad_()
    log_q, log_p = (F.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected * weights).sum().backward()

    results = ranks(world).run(divergence_and_gradient, dtype, temperature)
    precise, close = (torch.float64, 1e-12) if dtype is torch.float64 else (torch.float32, 2e-5)
    for divergence, _ in results:
        assert divergence.dtype == precise
        torch.testing.assert_close(divergence.double(), expected.detach(), rtol=close, atol=close)
    gradient = torch.cat([part for _, part in results], -1).double()
    torch.testing.assert_close(gradient, student.grad, rtol=tolerance, atol=tolerance)

"""RMSNorm whose weight is whole on every rank, also where tokens are sharded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.eps = eps
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] to the same shape."""
        weight = self.weight
        if self.sequence_parallel:
            weight = comm.sum_gradient(weight, self.group)
        return F.rms_norm(x, weight.shape, weight, self.eps)

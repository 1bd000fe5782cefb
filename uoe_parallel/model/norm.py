"""RMSNorm whose weight is whole on every rank, also where tokens are sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose


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
            weight = comm.sum_gradient(weight, self.group, Purpose.REPLICATED_WEIGHTS)
        norm, _ = choose_rms_norm(x.device.type)
        return norm(x, weight, self.eps)


Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(x [..., D], weight [D], eps) to the shape of x."""


@cache  # every forward pass asks, and an import that fails searches the disk
def choose_rms_norm(device_type: str) -> tuple[Norm, str]:
    """The fastest form that this machine has on "cpu" or "cuda", and that form's name for the log:
    Apex's fused kernel where it was built, else torch's."""
    fused = _apex_rms_norm() if device_type == "cuda" else None
    if fused is None:
        return lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), "torch.rms_norm"
    name = "apex.normalization's fused_rms_norm_affine"
    return lambda x, weight, eps: fused(x, weight, weight.shape, eps), name


def _apex_rms_norm() -> Callable[..., Tensor] | None:
    try:
        # Apex imports without its compiled part, and asks for it when it is called.
        import_module("fused_layer_norm_cuda")
        return import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    except (ImportError, AttributeError):
        return None

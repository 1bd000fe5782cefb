"""RMSNorm and LayerNorm, whose weights are whole on every rank, also where tokens are sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

NormKind = Literal["rms_norm", "layer_norm"]


class Norm(nn.Module):
    """Over the last dimension: y = x / rms(x) * weight (RMSNorm: Zhang and Sennrich, arXiv
    1910.07467), or y = (x - mean(x)) / std(x) * weight + bias (LayerNorm: Ba et al., arXiv
    1607.06450)."""

    def __init__(
        self,
        kind: NormKind,
        hidden_size: int,
        *,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if kind == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))
        self.eps = eps
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] to the same shape."""
        weight, bias = self.weight, self.bias
        if self.sequence_parallel:
            weight = comm.sum_gradient(weight, self.group, Purpose.REPLICATED_WEIGHTS)
            if bias is not None:
                bias = comm.sum_gradient(bias, self.group, Purpose.REPLICATED_WEIGHTS)
        norm, _ = choose_norm(self.kind, x.device.type)
        return norm(x, weight, bias, self.eps)


Normalize = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(x [..., D], weight [D], bias [D] of a LayerNorm, eps) to the shape of x."""


@cache  # every forward pass asks, and an import that fails searches the disk
def choose_norm(kind: NormKind, device_type: str) -> tuple[Normalize, str]:
    """The fastest form that this machine has on "cpu" or "cuda", and that form's name for the log:
    Apex's fused kernel where it was built, else torch's."""
    name = f"fused_{kind}_affine"
    fused = _apex(name) if device_type == "cuda" else None
    if fused is None:
        return (_torch_rms_norm if kind == "rms_norm" else _torch_layer_norm), f"torch.{kind}"

    def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        weights = (weight,) if bias is None else (weight, bias)
        return fused(x, *weights, weight.shape, eps)

    return normalize, f"apex.normalization's {name}"


def _torch_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _apex(name: str) -> Callable[..., Tensor] | None:
    try:
        # Apex imports without its compiled part, and asks for it when it is called.
        import_module("fused_layer_norm_cuda")
        return getattr(import_module("apex.normalization.fused_layer_norm"), name)
    except (ImportError, AttributeError):
        return None

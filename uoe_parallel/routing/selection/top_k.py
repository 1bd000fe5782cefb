"""Each unit takes its best experts."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.units import Units


class TopK:
    """Each unit takes its k best experts; ties go to the lowest index."""

    per_unit = True
    looks_ahead = False
    balances = False

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        self.k = config.top_k

    def __call__(self, scores_SBE: Tensor, units: Units) -> Tensor:
        # torch.topk breaks ties as it likes; a stable sort keeps the lowest index first.
        best = scores_SBE.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(scores_SBE, dtype=torch.bool).scatter_(-1, best, True)

"""Each unit takes its best experts."""

from __future__ import annotations

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
        # torch.topk breaks ties as it likes, and sorting all scores takes twice as long as this.
        least_SB1 = scores_SBE.topk(self.k, dim=-1).values[..., -1:]
        above_SBE, equal_SBE = scores_SBE > least_SB1, scores_SBE == least_SB1
        room_SB1 = self.k - above_SBE.sum(-1, keepdim=True)
        return above_SBE | (equal_SBE & (equal_SBE.cumsum(-1) <= room_SB1))

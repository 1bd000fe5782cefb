"""The auxiliary loss, sequence by sequence."""

from __future__ import annotations

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.balance import BalanceRule, Load


class SequenceLoss(BalanceRule):
    """n sum_i f_i p_i, f_i the share of the pairs that expert i took and p_i the mean softmax
    probability of i: 1 when both are even (Switch Transformer, arXiv 2101.03961, eq. 4).

    Gradients flow through p only. Each sequence is balanced by itself, so that no batch size and
    no layout changes the loss.
    """

    scope = "sequence"

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        self.num_experts = num_experts

    def loss(self, load: Load) -> Tensor:
        probabilities_SBE = load.scores_SBE.softmax(-1) * load.counted_SB.unsqueeze(-1)
        mean_BE = probabilities_SBE.sum(0) / load.units_B.unsqueeze(-1)
        return self.num_experts * (load.share_BE * mean_BE).sum()

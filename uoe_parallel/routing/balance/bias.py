"""Balance without a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.balance import BalanceRule
from uoe_parallel.routing.running import Running


class LoadBias(BalanceRule, Running):
    """A bias on each expert's scores where experts are chosen, not in gates: after a step, up by
    bias_rate for experts that took less than the mean and down for those that took more
    (loss-free balancing, arXiv 2408.15664)."""

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        self.rate = config.bias_rate
        self.state = {"bias": torch.zeros(num_experts, dtype=torch.float64)}
        self.observed = torch.zeros(num_experts, dtype=torch.float64)

    def offset(self) -> Tensor:
        return self.state["bias"]

    def observe(self, scores_SBE: Tensor, mask_SBE: Tensor, counted_SB: Tensor) -> None:
        self.to(scores_SBE.device)
        self.observed += (mask_SBE & counted_SB.unsqueeze(-1)).sum((0, 1))

    def move(self, observed: Tensor) -> None:
        self.state["bias"] = self.state["bias"] + self.rate * (observed.mean() - observed).sign()

    def shown(self) -> dict[str, Tensor]:
        return self.state

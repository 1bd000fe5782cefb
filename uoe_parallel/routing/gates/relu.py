"""Every expert is judged on its own, and a low score shuts it off."""

from __future__ import annotations

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig


class ReluGate:
    """relu(1 + s). Scores below -1 have no slope."""

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        pass

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        return (1 + scores_SBE).relu()

"""Every expert is judged on its own, and none is ever shut off."""

from __future__ import annotations

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig


class SigmoidGate:
    """2 sigmoid(s)."""

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        pass

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        return 2 * scores_SBE.sigmoid()

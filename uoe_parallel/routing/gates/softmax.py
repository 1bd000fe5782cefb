"""Experts share a fixed sum, chosen or not."""

from __future__ import annotations

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig


class SoftmaxGate:
    """n softmax(s) over all n experts, written as exp(s - max) / mean exp(s - max).

    n * softmax(0) would not be exactly 1 for every n in floating point.
    """

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        pass

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        exp_SBE = (scores_SBE - scores_SBE.amax(-1, keepdim=True).detach()).exp()
        return exp_SBE / exp_SBE.mean(-1, keepdim=True)

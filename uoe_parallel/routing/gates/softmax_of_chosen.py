"""The chosen experts share a fixed sum."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig


class SoftmaxOfChosenGate:
    """c softmax(s) over the c chosen experts, as mixtures of experts usually renormalise.

    With one chosen expert it is 1 whatever the score.
    """

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        pass

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        none_SB1 = ~mask_SBE.any(-1, keepdim=True)
        chosen_SBE = scores_SBE.masked_fill(~mask_SBE, -torch.inf).masked_fill(none_SB1, 0)
        exp_SBE = (chosen_SBE - chosen_SBE.amax(-1, keepdim=True).detach()).exp()
        count_SB1 = mask_SBE.sum(-1, keepdim=True) + none_SB1 * mask_SBE.shape[-1]
        return exp_SBE * count_SB1 / exp_SBE.sum(-1, keepdim=True)

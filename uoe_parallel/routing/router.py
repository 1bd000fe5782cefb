"""Scores to a routing: the selection rule and the gate, chosen by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.gates import GATES
from uoe_parallel.routing.selection import SELECTIONS


@dataclass(frozen=True)
class Routing:
    """The decision for a block's tokens."""

    mask_SBE: Tensor
    """bool: whether a token visits an expert."""
    gates_SBE: Tensor
    """fp32 (or fp64): the weight of the expert's result, meaningful where the mask is set."""


class Router:
    """The rules of one block. It knows scores only: no groups, no tokens, no experts."""

    def __init__(self, config: RoutingConfig) -> None:
        self.select = SELECTIONS[config.selection](config.top_k)
        self.gate = GATES[config.gate]()

    def __call__(self, scores_SBE: Tensor) -> Routing:
        """scores_SBE: fp32 (or fp64) [S, B, E]."""
        return Routing(self.select(scores_SBE.detach()), self.gate(scores_SBE))

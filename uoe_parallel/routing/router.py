"""A block's routing decision and the rules that make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.gates import GATES, Gate
from uoe_parallel.routing.selection import SELECTIONS, Selection


@dataclass(frozen=True)
class Routing:
    """The decision for a block's tokens."""

    mask_SBE: Tensor
    """bool: whether a token visits an expert."""
    gates_SBE: Tensor
    """fp32 (or fp64): the weight of the expert's result, meaningful where the mask is set."""


class Router:
    """The rules of one block, by their names. They know scores only: no groups, no experts."""

    def __init__(self, config: RoutingConfig) -> None:
        self.select: Selection = SELECTIONS[config.selection](config)
        self.gate: Gate = GATES[config.gate]()
        self.running: list[Any] = []
        """State of rules that moves during a run: objects with `shown() -> dict[str, Tensor]`, the
        vectors [E] to report by their names."""

"""A block's routing decision and the rules that make it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.config.rules import BALANCE_RULES, GATES, SELECTIONS, load_rule
from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.capacity import Capacity
from uoe_parallel.routing.level import Level, Summary
from uoe_parallel.routing.running import Running


@dataclass(frozen=True)
class Routing:
    """The decision for a block's tokens, over all experts."""

    mask_SBE: Tensor
    """bool: whether a token visits an expert. Never of padding."""
    gates_SBE: Tensor
    """fp32 (or fp64): the weight of the expert's result, meaningful where the mask is set."""


ROUTER_SUFFIX = "router_weight"
"""Of the names of all routers' weights, and of these alone."""


class Router:
    """The rules of one block. They know scores only: no groups, no experts.

    `levels` are in the order of their decisions, each among what the one before left over, by the
    names of their weights: "segment_router_weight" for expert selection, "router_weight" for data
    selection.
    """

    def __init__(
        self, config: RoutingConfig, *, num_experts: int, context: int, causal: bool
    ) -> None:
        self._config = config
        self.num_experts = num_experts
        count = config.shared_experts
        self.num_routed = num_experts - count
        self.shared = {number * num_experts // count for number in range(count)}
        """Experts that every token visits, spread so that ranks have about equally many."""
        self._routed = torch.tensor([e for e in range(num_experts) if e not in self.shared])
        self.levels: dict[str, Level] = {}
        if config.segment_experts is not None:
            self.levels["segment_router_weight"] = self._segments(causal)
        if config.selection is not None:
            self.levels["router_weight"] = self._patches(context, causal)

    @property
    def running(self) -> list[Running]:
        """The rules that move between steps."""
        return [rule for level in self.levels.values() for rule in level.running]

    def with_shared(self, values_SBE: Tensor) -> Tensor:
        """Of all experts: gates of one, or true, for shared ones beside the values of the others.
        Differentiable."""
        if not self.shared:
            return values_SBE
        whole_SBE = values_SBE.new_ones(*values_SBE.shape[:-1], self.num_experts)
        return whole_SBE.index_copy(-1, self._routed_on(values_SBE.device), values_SBE)

    def without_shared(self, values_SBE: Tensor) -> Tensor:
        """The inverse of `with_shared`."""
        if not self.shared:
            return values_SBE
        return values_SBE.index_select(-1, self._routed_on(values_SBE.device))

    def _routed_on(self, device: torch.device) -> Tensor:
        """Moved once, not in every pass."""
        self._routed = self._routed.to(device)
        return self._routed

    def _segments(self, causal: bool) -> Level:
        config = self._config
        assert config.segment_length is not None
        few = config.model_copy(update={"top_k": config.segment_experts})
        return Level(
            unit_length=config.segment_length,
            summary="previous_mean" if causal else "mean",
            selection=self._rule(SELECTIONS, "top_k", few),
            gate=self._rule(GATES, config.gate),
            balance=self._balance(["sequence_loss"]),
            capacity=None,
        )

    def _patches(self, context: int, causal: bool) -> Level:
        config = self._config
        assert config.selection is not None
        summary: Summary = "first" if causal else "mean"
        capacity = None
        if config.capacity_factor is not None:
            capacity = Capacity(
                config.capacity_factor,
                chosen=config.top_k,
                num_experts=self.num_routed,
                context=context,
                unit_length=config.patch_length,
            )
        selection = self._rule(SELECTIONS, config.selection)
        return Level(
            unit_length=config.patch_length,
            summary=summary,
            selection=selection,
            gate=self._rule(GATES, config.gate),
            balance=self._balance([] if selection.balances else ["sequence_loss"]),
            capacity=capacity,
        )

    def _balance(self, default: list[str]) -> list[Any]:
        names = default if self._config.balance is None else self._config.balance
        return [self._rule(BALANCE_RULES, name) for name in names]

    def _rule(
        self, table: MappingProxyType[str, str], name: str, config: RoutingConfig | None = None
    ) -> Any:
        return load_rule(table, name)(config or self._config, self.num_routed)

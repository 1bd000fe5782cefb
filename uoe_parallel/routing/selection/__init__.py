"""Which experts a unit visits: one class in each file, by the names in `config/rules.py`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from uoe_parallel.routing.units import Units


class Selection(Protocol):
    """Scores [S, B, E], each token with those of its unit, to a bool mask of the same shape, each
    token with the choice of its unit. Scores of -inf are of experts that can't be chosen.

    Built as `rule(config, num_experts)`, with the block's `RoutingConfig` and the number of experts
    that are routed. It may also be a `Running` rule.
    """

    per_unit: bool
    """Whether a unit's choice needs no scores but its own. Otherwise the rule gets those of whole
    sequences, and one token at a time can't be decoded."""
    looks_ahead: bool
    """Whether a later token's scores can change the choice: such a rule suits no causal model."""
    balances: bool
    """Whether it uses experts evenly by itself, so that no balance rule is needed."""

    def __call__(self, scores_SBE: Tensor, units: Units) -> Tensor: ...

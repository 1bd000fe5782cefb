"""Which experts a routed unit visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig


class Selection(Protocol):
    """Scores of whole sequences [S, B, E] to a mask of the same shape.

    `per_token` rules look at one token's scores only, so a shard of the sequence is enough for
    them; for others the layer gathers the scores of the whole sequence first.
    """

    per_token: bool

    def __call__(self, scores_SBE: Tensor) -> Tensor: ...


class TopK:
    """Each token takes its k best experts, none dropped; ties go to the lowest index."""

    per_token = True

    def __init__(self, config: RoutingConfig) -> None:
        self.k = config.top_k

    def __call__(self, scores_SBE: Tensor) -> Tensor:
        # torch.topk breaks ties as it likes; a stable sort keeps the lowest index first.
        best = scores_SBE.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(scores_SBE, dtype=torch.bool).scatter_(-1, best, True)


SELECTIONS: dict[str, Callable[[RoutingConfig], Selection]] = {"top_k": TopK}
"""By the name in the config."""

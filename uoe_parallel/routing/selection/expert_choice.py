"""Each expert takes its best units."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.units import Units


class ExpertChoice:
    """Each expert takes its best units of a document, as many as its even share, top_k / experts,
    rounded up (expert choice routing, arXiv 2202.09368). Ties go to the first unit.

    Whether a unit is among the best depends on those after it.
    """

    per_unit = False
    looks_ahead = True
    balances = True

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        self.top_k = config.top_k
        self.num_experts = num_experts

    def __call__(self, scores_SBE: Tensor, units: Units) -> Tensor:
        documents = units.documents
        number_T, first_T = documents.number_SB.flatten(), units.is_first_SB.flatten()
        scores_TE = scores_SBE.flatten(0, 1).masked_fill(~first_T.unsqueeze(-1), -torch.inf)
        # By document, then score; tokens of a document come in its order.
        by_score_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
        by_document_TE = number_T[by_score_TE].argsort(dim=0, stable=True)
        order_TE = by_score_TE.gather(0, by_document_TE)
        zeros_C = torch.zeros(documents.count, dtype=torch.int64, device=number_T.device)
        tokens_C = zeros_C.scatter_add(0, number_T, torch.ones_like(number_T))
        starts_C = tokens_C.cumsum(0) - tokens_C
        places_T = torch.arange(len(number_T), device=number_T.device)
        rank_TE = torch.empty_like(order_TE).scatter_(
            0, order_TE, places_T.unsqueeze(-1).expand_as(order_TE)
        )
        rank_TE = rank_TE - starts_C[number_T].unsqueeze(-1)
        units_C = zeros_C.scatter_add(0, number_T, first_T.long())
        limit_C = (self.top_k * units_C + self.num_experts - 1) // self.num_experts
        taken_TE = (rank_TE < limit_C[number_T].unsqueeze(-1)) & (scores_TE > -torch.inf)
        return units.first_of(taken_TE.view_as(scores_SBE))

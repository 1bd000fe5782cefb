"""A limit to what an expert takes of a document."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor

from uoe_parallel.routing.units import Units


class Capacity:
    """Experts take a document's units in the order of their positions until they are full.

    The limit follows the context length that the model is configured for, not the document at hand,
    so that what comes later decides nothing: a prefix keeps what it had.
    """

    def __init__(
        self, factor: float, *, chosen: int, num_experts: int, context: int, unit_length: int
    ) -> None:
        """chosen: experts that a unit visits."""
        units = math.ceil(context / unit_length)
        # As the number is written: 1.1 is a little more in binary.
        self.limit = math.ceil(Fraction(str(factor)) * chosen * units / num_experts)

    def __call__(self, mask_SBE: Tensor, units: Units) -> Tensor:
        """What is kept of a choice, bool [S, B, E] of whole sequences."""
        taken_SBE = (mask_SBE & units.is_first_SB.unsqueeze(-1)).long()
        until_SBE = taken_SBE.cumsum(0)
        document_SBE = units.documents.first_SB.unsqueeze(-1).expand_as(until_SBE)
        before_document_SBE = (until_SBE - taken_SBE).gather(0, document_SBE)
        return mask_SBE & (until_SBE - before_document_SBE <= self.limit)

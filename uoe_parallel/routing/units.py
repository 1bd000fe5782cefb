"""Patches and segments: runs of neighbouring tokens that are routed as one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uoe_parallel.experts.documents import Documents


@dataclass(frozen=True)
class Units:
    """The units of some positions of some sequences: each `length` tokens of a document, the last
    one what is left."""

    length: int
    first_SB: Tensor
    """int64: where in these positions the first token of each token's unit is."""
    is_first_SB: Tensor
    """bool: whether a token is the first of its unit; never of padding."""
    number_in_document_SB: Tensor
    """int64: number of each token's unit in its document, from 0."""
    documents: Documents
    """Of the whole sequences."""

    @classmethod
    def of(cls, documents: Documents, length: int) -> Units:
        """Units of `length` tokens of whole sequences, worked out once for all layers."""
        key = (cls, length)
        if key not in documents.derived:
            documents.derived[key] = cls._of(documents, length)
        return documents.derived[key]

    @classmethod
    def _of(cls, documents: Documents, length: int) -> Units:
        offset_SB = documents.position_SB % length
        places_S1 = torch.arange(len(offset_SB), device=offset_SB.device).unsqueeze(1)
        is_first_SB = offset_SB == 0
        if documents.real_SB is not None:
            is_first_SB = is_first_SB & documents.real_SB
        return cls(
            length=length,
            first_SB=places_S1 - offset_SB,
            is_first_SB=is_first_SB,
            number_in_document_SB=documents.position_SB // length,
            documents=documents,
        )

    def at(self, positions: slice) -> Units:
        """Those of a part of the positions. Of a unit that begins before it, `first_SB` is negative
        there."""
        return Units(
            length=self.length,
            first_SB=self.first_SB[positions] - positions.start,
            is_first_SB=self.is_first_SB[positions],
            number_in_document_SB=self.number_in_document_SB[positions],
            documents=self.documents,
        )

    def lie_within(self, shard_length: int) -> bool:
        """Whether no unit reaches over the border of two shards of so many positions."""
        return self.length == 1 or (self.documents.one_each and shard_length % self.length == 0)

    def first_of(self, x_SBE: Tensor) -> Tensor:
        """What the first token of each token's unit has. Differentiable."""
        return x_SBE if self.length == 1 else x_SBE.gather(0, self._expand(self.first_SB, x_SBE))

    def mean_of(self, x_SBE: Tensor) -> Tensor:
        """The mean over each token's unit. Differentiable."""
        return x_SBE if self.length == 1 else self.first_of(self._means_at_first(x_SBE))

    def mean_of_previous(self, x_SBE: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the unit before each token's in the same document, zero where there is
        none, and bool [S, B], whether there is one. Differentiable."""
        there_SB = self.number_in_document_SB > 0
        previous_SB = torch.where(there_SB, self.first_SB - self.length, 0)
        means_SBE = self._means_at_first(x_SBE).gather(0, self._expand(previous_SB, x_SBE))
        return means_SBE * there_SB.unsqueeze(-1), there_SB

    def sums_at_first(self, x_SBE: Tensor) -> Tensor:
        """At the first token of each unit its sum. Differentiable."""
        # Added up token by token (on a CPU in their order), so that nothing that comes after a unit
        # can touch a bit of it.
        return torch.zeros_like(x_SBE).scatter_add(0, self._expand(self.first_SB, x_SBE), x_SBE)

    def _means_at_first(self, x_SBE: Tensor) -> Tensor:
        """At the first token of each unit its mean."""
        sums_SBE = self.sums_at_first(x_SBE)
        ones_SB = torch.ones_like(self.first_SB)
        sizes_SB = torch.zeros_like(ones_SB).scatter_add(0, self.first_SB, ones_SB)
        return sums_SBE / sizes_SB.clamp(min=1).unsqueeze(-1)

    @staticmethod
    def _expand(index_SB: Tensor, like_SBE: Tensor) -> Tensor:
        return index_SB.unsqueeze(-1).expand_as(like_SBE)

"""Which tokens of a micro-batch belong together.

Attention, rotary positions, patches, segments and capacities know one document at a time: what is
packed beside it in the same row does not exist for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of some sequences, of equal length S. S counts whole sequences here, whatever
    part of them a rank holds."""

    number_SB: Tensor
    """int64: the number of each token's document, counted over all sequences, the first sequence's
    first. It grows along a sequence. Runs of padding are numbered too."""
    position_SB: Tensor
    """int64: the token's place in its document, from 0."""
    count: int
    """Documents in all sequences."""
    real_SB: Tensor | None = None
    """bool, False for padding; None if there is none."""
    one_each: bool = False
    """Whether every sequence is one document without padding."""
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What layers work out of this and need in each of them, kept by whoever does."""

    @classmethod
    def whole(cls, length: int, sequences: int, device: torch.device) -> Documents:
        """Every sequence is one document."""
        shape = (length, sequences)
        return cls(
            number_SB=torch.arange(sequences, device=device).expand(shape),
            position_SB=torch.arange(length, device=device).unsqueeze(1).expand(shape),
            count=sequences,
            one_each=True,
        )

    @classmethod
    def from_ids(cls, ids_BS: Tensor) -> Documents:
        """From int64 [B, S] with one id for all tokens of a document, another one for the next,
        and -1 for padding."""
        ids_SB = ids_BS.transpose(0, 1)
        starts_SB = torch.ones_like(ids_SB, dtype=torch.bool)
        starts_SB[1:] = ids_SB[1:] != ids_SB[:-1]
        # Sequence after sequence.
        number_SB = starts_SB.transpose(0, 1).flatten().cumsum(0).view(ids_BS.shape) - 1
        place_SB = torch.arange(len(ids_SB), device=ids_SB.device).unsqueeze(1).expand_as(ids_SB)
        first_SB = torch.where(starts_SB, place_SB, 0).cummax(0).values
        return cls(
            number_SB=number_SB.transpose(0, 1),
            position_SB=place_SB - first_SB,
            count=int(number_SB[-1, -1]) + 1,
            real_SB=ids_SB >= 0,
        )

    @classmethod
    def step(cls, position_B: Tensor) -> Documents:
        """A token for each sequence, which goes on its one document at place `position_B`, int64.

        For decoding with a cache: what is before the token is not here.
        """
        number_B = torch.arange(len(position_B), device=position_B.device)
        return cls(number_B.unsqueeze(0), position_B.unsqueeze(0), count=len(position_B))

    @property
    def shape(self) -> torch.Size:
        """(S, B)."""
        return self.number_SB.shape

    @property
    def last_B(self) -> Tensor:
        """int64: the place of each sequence's last token that is no padding, where each is one
        document with padding behind it."""
        length, batch = self.shape
        if self.real_SB is None:
            return torch.full((batch,), length - 1, device=self.number_SB.device)
        return self.real_SB.sum(0) - 1

    @cached_property
    def real_tokens(self) -> tuple[Tensor, Tensor]:
        """Place s * B + b of each token that is no padding, document after document, and the
        number of such tokens of each document, int64 [count]."""
        length, batch = self.shape
        number_BS = self.number_SB.transpose(0, 1)
        row_BS = torch.arange(length * batch, device=number_BS.device).view(self.shape).t()
        real_BS = torch.ones_like(row_BS, dtype=torch.bool)
        if self.real_SB is not None:
            real_BS = self.real_SB.transpose(0, 1)
        return row_BS[real_BS], torch.bincount(number_BS[real_BS], minlength=self.count)

    def sum_by_sequence(self, lengths_EC: Tensor) -> Tensor:
        """Of a count for each of E experts and each document, the sum for each sequence: [E, B]."""
        length, batch = self.shape
        sequence_SB = torch.arange(batch, device=self.number_SB.device).expand(length, batch)
        sequence_C = torch.empty_like(lengths_EC[0]).scatter_(
            0, self.number_SB.flatten(), sequence_SB.flatten()
        )
        sums_EB = lengths_EC.new_zeros(len(lengths_EC), batch)
        return sums_EB.index_add(1, sequence_C, lengths_EC)

    @property
    def first_SB(self) -> Tensor:
        """int64: the place in the sequence of the first token of each token's document."""
        places_S1 = torch.arange(self.shape[0], device=self.number_SB.device).unsqueeze(1)
        return places_S1 - self.position_SB

    def shard(self, rank: int, num_shards: int) -> slice:
        """The positions that rank `rank` of `num_shards` holds of each sequence."""
        length = self.shape[0] // num_shards
        return slice(rank * length, (rank + 1) * length)

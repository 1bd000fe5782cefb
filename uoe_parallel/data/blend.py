"""Several corpora that are drawn from by weight, as one list of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from numpy.random import BitGenerator

from uoe_parallel.data.batches import Examples, MicroBatch
from uoe_parallel.data.draws import Draws


class Blend:
    """The examples of one task of several corpora, those of the first from number 0 on."""

    def __init__(self, parts: Sequence[Examples], weights: Sequence[float]) -> None:
        """weights: of each corpus in the examples drawn, above 0 and relative to each other."""
        self._parts = parts
        self.draws = Draws([len(part) for part in parts], weights)

    @property
    def fingerprint(self) -> list[object]:
        """The share of each corpus and its fingerprint."""
        pairs = zip(self.draws.shares, self._parts, strict=True)
        return [[share, *part.fingerprint] for share, part in pairs]

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def micro_batch(
        self, numbers: Sequence[int], streams: Sequence[BitGenerator], size: int
    ) -> MicroBatch:
        rows: list[MicroBatch] = []
        for number, stream in zip(numbers, streams, strict=True):
            corpus, own = self.draws.corpus_of(number)
            rows.append(self._parts[corpus].micro_batch([own], [stream], 1))
        if len(rows) < size:
            rows.append(self._parts[0].micro_batch([], [], size - len(rows)))
        columns = ([getattr(row, field.name) for row in rows] for field in fields(MicroBatch))
        tokens, labels, loss_mask, documents = columns
        return MicroBatch(
            torch.cat(tokens),
            torch.cat(labels),
            torch.cat(loss_mask),
            None if documents[0] is None else torch.cat(documents),
        )

"""Which rows each expert of this rank takes: all that an expert learns about routing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.rows import RowCopies


@dataclass(frozen=True)
class Chunk:
    """The pairs of some neighbouring experts."""

    pairs: slice
    experts: slice
    counts_E: Tensor
    """Pairs of each of these experts, int64."""


@dataclass(frozen=True)
class Assignment:
    """(row, expert) pairs sorted by (expert, document, position).

    In that order every expert's rows are one block, and within it every document's rows are one
    run in which a lower-triangular mask is the causal mask of the original positions.
    """

    copies: RowCopies
    """A copy for each pair, of its row among this rank's rows. Every row has at least one, unless
    tokens are replicated."""
    expert_counts_E: Tensor
    """Pairs of each expert, int64."""
    token_N: Tensor
    """Each pair's token, s * B + b among those of `documents`, int64."""
    documents: Documents
    """Of whole sequences."""

    @cached_property
    def position_N(self) -> Tensor:
        """Original position of each pair's token in its document, int64."""
        return self.documents.position_SB.take(self.token_N)

    @cached_property
    def run_lengths_G(self) -> Tensor:
        """Pairs of each (expert, document), expert-major, int64."""
        num_experts, count = len(self.expert_counts_E), self.documents.count
        expert_N = torch.repeat_interleave(self.expert_counts_E, output_size=len(self.token_N))
        run_N = expert_N * count + self.documents.number_SB.take(self.token_N)
        return torch.bincount(run_N, minlength=num_experts * count)

    def chunks(self, most_pairs: int | None) -> list[Chunk]:
        """All experts, in turn: as many as have at most `most_pairs` together, or one with more."""
        if most_pairs is None or len(self.token_N) <= most_pairs:
            return [Chunk(slice(None), slice(None), self.expert_counts_E)]
        chunks: list[Chunk] = []
        first = begin = end = 0
        counts = self.expert_counts_E.tolist()
        for expert, count in enumerate([*counts, most_pairs + 1]):
            if end + count - begin > most_pairs and expert > first:
                experts = slice(first, expert)
                chunks.append(Chunk(slice(begin, end), experts, self.expert_counts_E[experts]))
                first, begin = expert, end
            end += count
        return chunks

    def gather(self, rows_RD: Tensor) -> Tensor:
        """A copy of each pair's row: [N, D]."""
        return self.copies.gather(rows_RD)


def sort_pairs(
    *,
    row_N: Tensor,
    expert_N: Tensor,
    token_N: Tensor,
    documents: Documents,
    num_rows: int,
    num_experts: int,
) -> tuple[Assignment, Tensor]:
    """Sort pairs that come in the order of their rows, and the pairs of a row in that of experts.

    A row's pairs follow each other, and the rows of a document are in the order of positions. All
    inputs are int64 [N]. Returns the assignment and the order: pair `order[i]` of the input is the
    i-th of the assignment.
    """
    run_N = expert_N * documents.count + documents.number_SB.take(token_N)
    order = torch.argsort(run_N, stable=True)
    assignment = Assignment(
        copies=RowCopies(row_N[order], num_rows),
        expert_counts_E=torch.bincount(expert_N, minlength=num_experts),
        token_N=token_N[order],
        documents=documents,
    )
    return assignment, order

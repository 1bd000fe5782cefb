"""Which rows each expert of this rank takes: all that an expert learns about routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """(row, expert) pairs sorted by (expert, document, position).

    In that order every expert's rows are one block, and within it every document's rows are one
    run in which a lower-triangular mask is the causal mask of the original positions.
    """

    row_N: Tensor
    """Index of each pair's row among this rank's rows, int64."""
    position_N: Tensor
    """Original position of each pair's token in its document, int64."""
    document_N: Tensor
    """Number of each pair's document, int64."""
    expert_counts_E: Tensor
    """Pairs of each expert, int64."""
    run_lengths_G: Tensor
    """Pairs of each (expert, document), expert-major, int64."""
    num_rows: int
    """Rows on this rank, each of at least one pair unless tokens are replicated."""

    def gather(self, rows_RD: Tensor) -> Tensor:
        """A copy of each pair's row: [N, D]."""
        return rows_RD.index_select(0, self.row_N)

    def sum_by_row(self, pairs_ND: Tensor) -> Tensor:
        """The sum of each row's pairs, in expert order: [R, D]."""
        rows_RD = pairs_ND.new_zeros(self.num_rows, pairs_ND.shape[1])
        return rows_RD.index_add(0, self.row_N, pairs_ND)


def sort_pairs(
    *,
    row_N: Tensor,
    expert_N: Tensor,
    document_N: Tensor,
    position_N: Tensor,
    num_rows: int,
    num_experts: int,
    num_documents: int,
) -> tuple[Assignment, Tensor]:
    """Sort pairs that come in position order within each document.

    All inputs are int64 [N]. Returns the assignment and the order: pair `order[i]` of the input
    is the i-th of the assignment.
    """
    run_N = expert_N * num_documents + document_N
    order = torch.argsort(run_N, stable=True)
    run_lengths_G = torch.bincount(run_N, minlength=num_experts * num_documents)
    assignment = Assignment(
        row_N=row_N[order],
        position_N=position_N[order],
        document_N=document_N[order],
        expert_counts_E=run_lengths_G.view(num_experts, num_documents).sum(1),
        run_lengths_G=run_lengths_G,
        num_rows=num_rows,
    )
    return assignment, order

"""Copies of rows, and sums of what became of the copies.

Shape suffixes: R rows, N copies of rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowCopies:
    """Which row each copy is of. Each direction is the other's gradient.

    Sums are taken row by row, in an order that is the same on every device and in every pass, and
    not by adding up in whatever order copies come.
    """

    row_N: Tensor
    """Index of each copy's row, int64."""
    by_row_N: Tensor
    """The copies, row after row, in the order in which a row's copies are summed: int64."""
    starts_R: Tensor
    """Where each row's copies begin in `by_row_N`, and a last entry of N: int64 [R + 1]."""

    @classmethod
    def of(cls, row_N: Tensor, num_rows: int, by_row_N: Tensor | None = None) -> RowCopies:
        """Of int64 [N]. Each row's copies are summed in their order, or in that of `by_row_N`."""
        if by_row_N is None:
            by_row_N = torch.argsort(row_N, stable=True)
        starts_R = row_N.new_zeros(num_rows + 1)
        torch.cumsum(torch.bincount(row_N, minlength=num_rows), 0, out=starts_R[1:])
        return cls(row_N, by_row_N, starts_R)

    def gather(self, rows_RD: Tensor) -> Tensor:
        """Each copy: [N, D]. Differentiable."""
        return _Gather.apply(rows_RD, self)

    def sum(self, copies_ND: Tensor) -> Tensor:
        """The sum of each row's copies, zero where it has none: [R, D]. Differentiable."""
        return _Sum.apply(copies_ND, self)

    def take(self, rows_RD: Tensor) -> Tensor:
        """`gather` without gradients."""
        return rows_RD.index_select(0, self.row_N)

    def add_up(self, copies_ND: Tensor) -> Tensor:
        """`sum` without gradients."""
        # A bag is what torch's embeddings call a few rows that are summed: one pass over the
        # copies, in parallel over the rows.
        return F.embedding_bag(
            self.by_row_N, copies_ND, self.starts_R, mode="sum", include_last_offset=True
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, copies: RowCopies) -> Tensor:
        ctx.copies = copies
        return copies.take(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.add_up(grad_outputs[0].contiguous()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies_ND: Tensor, copies: RowCopies) -> Tensor:
        ctx.copies = copies
        return copies.add_up(copies_ND)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.take(grad_outputs[0]), None

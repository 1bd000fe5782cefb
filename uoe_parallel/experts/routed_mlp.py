"""The gated sum of each row's feed-forward experts, and its gradients, a chunk of pairs at a time.

A pair's copy of its row is as wide as the model, its hidden row only as wide as a slice. Only the
hidden rows are kept for backward, where the copies are made again. On a CPU copies live for a chunk
that fits into the cache, so that neither time nor memory goes into carrying them out and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.experts.activation import activate, activation_gradient
from uoe_parallel.experts.assignment import Assignment, Chunk
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.slices import SlicedColumnParallelLinear, SlicedRowParallelLinear


@dataclass(frozen=True)
class Slices:
    """What experts are made of, but for the weights themselves."""

    fc1: SlicedColumnParallelLinear
    fc2: SlicedRowParallelLinear
    backend: Backend
    gated: bool

    def chunks(self, assignment: Assignment, x_RD: Tensor) -> list[Chunk]:
        limit = self.backend.chunk_bytes
        row_bytes = x_RD.shape[1] * x_RD.element_size()
        return assignment.chunks(None if limit is None else max(1, limit // row_bytes))


class RoutedMLP(torch.autograd.Function):
    """sum_i g_i act(x W1_i + b1_i) W2_i of each row x over its pairs.

    x [R, D], gates [N] (fp32 or fp64), then the weight of `slices.fc2`, the bias of `slices.fc1` or
    None, and its weight, to [R, D]: in the order in which a backward pass is expected to finish
    their gradients. The parameters themselves are kept for it. Saved tensors or views would hold on
    to what DeepSpeed gathers for a moment under ZeRO 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor,
        fc2: Tensor,
        bias: Tensor | None,
        fc1: Tensor,
        slices: Slices,
        assignment: Assignment,
    ) -> Tensor:
        w1_EFD, w2_EDF = slices.fc1.slices(fc1), slices.fc2.slices(fc2)
        products = slices.backend.products
        hidden_NF = x_RD.new_empty(len(gates_N), w1_EFD.shape[1])
        y = _RowSums(x_RD, assignment)
        for chunk in slices.chunks(assignment, x_RD):
            rows = x_RD.index_select(0, assignment.copies.row_N[chunk.pairs])
            hidden = products(rows, w1_EFD[chunk.experts].transpose(1, 2), chunk.counts_E)
            del rows
            if bias is not None:
                hidden += _of_pairs(bias.view(len(w1_EFD), -1)[chunk.experts], chunk)
            hidden_NF[chunk.pairs] = hidden
            # A gate on the narrow hidden row is the gate on the wide result: fc2 is linear.
            active = activate(hidden, slices.gated).mul_(gates_N[chunk.pairs].unsqueeze(1))
            del hidden
            y.add(chunk, products(active, w2_EDF[chunk.experts].transpose(1, 2), chunk.counts_E))
        ctx.save_for_backward(x_RD, gates_N, hidden_NF)
        ctx.parameters, ctx.slices, ctx.assignment = (fc1, bias, fc2), slices, assignment
        return y.total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x_RD, gates_N, hidden_NF), (fc1, bias, fc2) = ctx.saved_tensors, ctx.parameters
        slices, assignment, (dy_RD,) = ctx.slices, ctx.assignment, grad_outputs
        backend, gated = slices.backend, slices.gated
        w1_EFD, w2_EDF = slices.fc1.slices(fc1), slices.fc2.slices(fc2)
        d_fc1, d_fc2 = torch.empty_like(fc1), torch.empty_like(fc2)
        dw1_EFD, dw2_EDF = slices.fc1.slices(d_fc1), slices.fc2.slices(d_fc2)
        d_bias = None if bias is None else torch.zeros_like(bias)
        d_gates_N = torch.empty_like(gates_N)
        dx = _RowSums(x_RD, assignment)
        for chunk in slices.chunks(assignment, x_RD):
            row_n, counts_E = assignment.copies.row_N[chunk.pairs], chunk.counts_E
            hidden, gate = hidden_NF[chunk.pairs], gates_N[chunk.pairs].unsqueeze(1)
            dy = dy_RD.index_select(0, row_n)
            d_active = backend.products(dy, w2_EDF[chunk.experts], counts_E)
            active = activate(hidden, gated)
            d_gates_N[chunk.pairs] = (d_active * active).sum(1, dtype=gates_N.dtype)
            active.mul_(gate)
            backend.outer_products(dw2_EDF[chunk.experts], dy, active, counts_E, add=chunk.goes_on)
            del dy, active
            d_hidden = activation_gradient(d_active.mul_(gate), hidden, gated)
            del d_active
            if d_bias is not None:
                d_bias_EF = d_bias.view(len(w1_EFD), -1)[chunk.experts]
                d_bias_EF.index_add_(0, torch.repeat_interleave(counts_E), d_hidden)
            rows = x_RD.index_select(0, row_n)
            backend.outer_products(
                dw1_EFD[chunk.experts], d_hidden, rows, counts_E, add=chunk.goes_on
            )
            del rows
            dx.add(chunk, backend.products(d_hidden, w1_EFD[chunk.experts], counts_E))
        return dx.total, d_gates_N, d_fc2, d_bias, d_fc1, None, None


class _RowSums:
    """Sums of pairs by row, that chunks add to."""

    def __init__(self, like_RD: Tensor, assignment: Assignment) -> None:
        self._like_RD = like_RD
        self._copies = assignment.copies
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """[R, D]."""
        assert self._total is not None, "there is at least one chunk"
        return self._total

    def add(self, chunk: Chunk, pairs_ND: Tensor) -> None:
        if len(pairs_ND) == len(self._copies.row_N):
            # In a fixed order also where adding at an index is done in any order.
            self._total = self._copies.add_up(pairs_ND)
            return
        if self._total is None:
            self._total = torch.zeros_like(self._like_RD)
        self._total.index_add_(0, self._copies.row_N[chunk.pairs], pairs_ND)


def _of_pairs(x_EF: Tensor, chunk: Chunk) -> Tensor:
    """Each pair's own of what experts have: [N, F]."""
    return torch.repeat_interleave(x_EF, chunk.counts_E, dim=0)

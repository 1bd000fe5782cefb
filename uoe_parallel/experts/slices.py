"""Megatron's column- and row-parallel linears, cut further into equal slices, one per expert.

A tensor rank's shard of the weight holds the slices of its experts, one after the other, so the
union of all experts is the dense linear with the very same parameter. Called with row counts
they multiply each expert's rows by its slice; called without a backend, they are Megatron's dense
linears with Megatron's communication.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.backends import Backend
from uoe_parallel.parallel.purposes import Purpose, labelled

InitMethod = Callable[[Tensor], object]


class SlicedColumnParallelLinear(ColumnParallelLinear):
    """y = x A + b with A = [A_1 | ... | A_n] cut by columns, A_i of width output_size / n."""

    weight: nn.Parameter  # Megatron allows None, for tied weights
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_slices: int,
        *,
        bias: bool,
        config: ModelParallelConfig,
        init_method: InitMethod,
        group: ProcessGroup,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            gather_output=False,
            tp_group=group,
        )
        self.num_local_slices = num_slices // group.size()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        counts_E: Tensor | None = None,
        backend: Backend | None = None,
        columns: slice = slice(None),
    ) -> Tensor:
        """Dense, without a backend: x [S or S/P, B, D] to [S, B, width of this rank].

        Sliced: x [N, D], rows sorted by expert with `counts_E` of each, to [N, slice width].
        Without counts every row is multiplied by every slice: [slices, N, slice width].
        `columns` are the part of each slice's width that is wanted.
        """
        if backend is None:
            assert isinstance(self.tp_group, ProcessGroup)
            return labelled(Purpose.DENSE_BLOCKS, self.tp_group, super().forward, x)[0]
        if counts_E is None:
            with _released_with(self.weight):
                w_EMD = self.slices(self.weight)[:, columns]
                y = backend.all_products(x, w_EMD.transpose(1, 2))
        else:
            y = _SlicedProduct.apply(x, self.weight, counts_E, backend, self, columns)
        if self.bias is None:
            return y
        b_EM = self.bias.view(self.num_local_slices, -1)[:, columns]
        if counts_E is None:
            return y + b_EM.unsqueeze(1)
        return y + torch.repeat_interleave(b_EM, counts_E, dim=0, output_size=x.shape[0])

    def slices(self, weight: Tensor) -> Tensor:
        """A view of the weight: [slices, slice width, D]."""
        return weight.view(self.num_local_slices, -1, self.input_size)


class SlicedRowParallelLinear(RowParallelLinear):
    """y = x A + b with A = [A_1; ...; A_n] cut by rows.

    b belongs to the union, not to an expert: it is `self.bias`, left for the caller to add once.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_slices: int,
        *,
        bias: bool,
        config: ModelParallelConfig,
        init_method: InitMethod,
        group: ProcessGroup,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=group,
        )
        self.num_local_slices = num_slices // group.size()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, assignment: Assignment | None = None, backend: Backend | None = None
    ) -> Tensor:
        """Dense: x [S, B, width of this rank] to [S or S/P, B, D], summed over the group.

        Sliced: x [N, slice width] of an assignment's pairs to [R, D], summed over each row's pairs
        in the order of experts, not over the group.
        """
        if assignment is None or backend is None:
            assert isinstance(self.tp_group, ProcessGroup)
            return labelled(Purpose.DENSE_BLOCKS, self.tp_group, super().forward, x)[0]
        return _SummedProduct.apply(x, self.weight, assignment, backend, self)

    def slices(self, weight: Tensor) -> Tensor:
        """A view of the weight: [slices, D, slice width]."""
        return weight.view(self.output_size, self.num_local_slices, -1).transpose(0, 1)


class _SlicedProduct(torch.autograd.Function):
    """Each expert's rows times its slice: x [N, K] and a slice [M, K] of its weight to [N, M].

    Of the weight the parameter itself is kept for backward. A saved tensor or a view would hold on
    to what DeepSpeed gathers for a moment under ZeRO 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight: Tensor,
        counts_E: Tensor,
        backend: Backend,
        linear: SlicedColumnParallelLinear,
        columns: slice,
    ) -> Tensor:
        ctx.save_for_backward(x_NK, counts_E)
        ctx.weight, ctx.backend, ctx.linear, ctx.columns = weight, backend, linear, columns
        w_EMK = linear.slices(weight)[:, columns]
        return backend.products(x_NK, w_EMK.transpose(1, 2), counts_E)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x_NK, counts_E), weight = ctx.saved_tensors, ctx.weight
        dy_NM = grad_outputs[0].contiguous()
        dx_NK = d_weight = None
        if ctx.needs_input_grad[1]:
            all_columns = ctx.columns == slice(None)
            d_weight = torch.empty_like(weight) if all_columns else torch.zeros_like(weight)
            dw_EMK = ctx.linear.slices(d_weight)[:, ctx.columns]
            ctx.backend.outer_products(dw_EMK, dy_NM, x_NK, counts_E)
        # The gradient of the rows may take their place.
        del x_NK
        ctx.maybe_clear_saved_tensors()
        if ctx.needs_input_grad[0]:
            w_EMK = ctx.linear.slices(weight)[:, ctx.columns]
            dx_NK = ctx.backend.products(dy_NM, w_EMK, counts_E)
        return dx_NK, d_weight, None, None, None, None


class _SummedProduct(torch.autograd.Function):
    """As `_SlicedProduct`, from [N, K], summed over each row's pairs: [R, M].

    Results of pairs are as wide as the model, and live for some experts at a time only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight: Tensor,
        assignment: Assignment,
        backend: Backend,
        linear: SlicedRowParallelLinear,
    ) -> Tensor:
        ctx.save_for_backward(x_NK)
        ctx.weight, ctx.assignment, ctx.backend, ctx.linear = weight, assignment, backend, linear
        w_EKM = linear.slices(weight).transpose(1, 2)
        chunks = assignment.chunks(_most_pairs(backend, x_NK, linear.output_size))
        results = (
            backend.products(x_NK[chunk.pairs], w_EKM[chunk.experts], chunk.counts_E)
            for chunk in chunks
        )
        if len(chunks) == 1:
            return assignment.copies.add_up(*results)
        y_RM = x_NK.new_zeros(assignment.copies.num_rows, linear.output_size)
        for chunk, y_NM in zip(chunks, results, strict=True):
            y_RM.index_add_(0, assignment.copies.row_N[chunk.pairs], y_NM)
        return y_RM

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x_NK,), weight, backend = ctx.saved_tensors, ctx.weight, ctx.backend
        assignment, (dy_RM,) = ctx.assignment, grad_outputs
        d_weight, dx_NK = torch.empty_like(weight), torch.empty_like(x_NK)
        w_EMK, dw_EMK = ctx.linear.slices(weight), ctx.linear.slices(d_weight)
        for chunk in assignment.chunks(_most_pairs(backend, x_NK, ctx.linear.output_size)):
            dy_NM = dy_RM.index_select(0, assignment.copies.row_N[chunk.pairs])
            dx_NK[chunk.pairs] = backend.products(dy_NM, w_EMK[chunk.experts], chunk.counts_E)
            backend.outer_products(dw_EMK[chunk.experts], dy_NM, x_NK[chunk.pairs], chunk.counts_E)
        return dx_NK, d_weight, None, None, None


def _most_pairs(backend: Backend, x_NK: Tensor, width: int) -> int | None:
    """Pairs whose results of so many elements `backend` holds at a time."""
    if backend.chunk_bytes is None:
        return None
    return max(1, backend.chunk_bytes // (width * x_NK.element_size()))


def _released_with(weight: nn.Parameter) -> AbstractContextManager[object]:
    """Under ZeRO 3, have autograd note how views of `weight` lie instead of keeping them.

    A view that is kept for backward holds the gathered weight after DeepSpeed has let go of it, so
    that in the end every rank holds the whole model. DeepSpeed gathers the weight again before the
    backward pass of its module, and the view is made anew from that.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if saved.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            return saved
        offset = int(saved.storage_offset()) - int(weight.storage_offset())
        return saved.shape, saved.stride(), offset

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, stride, offset = packed
        return weight.detach().as_strided(shape, stride, int(weight.storage_offset()) + offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

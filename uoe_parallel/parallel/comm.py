"""Every collective of this project's own layers, differentiable ones first.

Each is one call on an explicit group; the differentiable ones are megatron-core's mappings where
those hold for every input. `purpose` is what it is for, as whoever looks on is told: forward and
in the backward pass.
Dimension 0 is the sequence (or row) dimension throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from uoe_parallel.parallel.purposes import Purpose, labelled


def sum_gradient(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """`x` unchanged; its gradient is summed over `group`.

    For what every rank holds whole while each uses it for another share of the work:
    activations that meet a shard of the experts, or a parameter (norm, router, output bias)
    that meets a shard of the tokens.
    """
    return labelled(purpose, group, _SumGradient.apply, x, group)


class _SumGradient(torch.autograd.Function):
    """As megatron-core's mapping, which all-reduces the incoming gradient in place: that loses the
    sum of a strided gradient in silence, and changes one that another branch is still to read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        if ctx.group.size() == 1:
            return grad_outputs[0], None
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_forward(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """The sum of `x` over `group`; its gradient passes unchanged.

    `x` is contiguous and overwritten: a result that nothing else reads, backward included.
    """
    assert x.is_contiguous(), "a strided x would come back unsummed"
    return labelled(
        purpose, group, mappings.reduce_from_tensor_model_parallel_region, x, group=group
    )


def gather_last_dim(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """[..., V/P] shards to [..., V] on every rank. Each rank's gradient must be that of the whole:
    its own part of it is taken."""
    return labelled(
        purpose, group, mappings.gather_from_tensor_model_parallel_region, x, group=group
    )


def gather_sequence(shard: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """The shards [S/P, ...] of all ranks as [S, ...] on each. Every rank may use another part of
    it: their gradients are summed and scattered."""
    gather = mappings.gather_from_sequence_parallel_region
    return labelled(purpose, group, gather, shard.contiguous(), group=group)


def all_to_all(
    rows: Tensor,
    receive_counts: list[int],
    send_counts: list[int],
    group: ProcessGroup,
    purpose: Purpose,
) -> Tensor:
    """Send `send_counts[p]` rows to each rank p; returns the received rows in rank order.

    rows: [sum(send_counts), ...], sorted by destination. Differentiable: gradients travel the
    way back. Every rank must call it, also with no rows.
    """
    exchange = mappings.all_to_all
    return labelled(purpose, group, exchange, group, rows, receive_counts, send_counts)


def start_all_to_all(
    rows: Tensor,
    receive_counts: list[int],
    send_counts: list[int],
    group: ProcessGroup,
    purpose: Purpose,
) -> Callable[[], Tensor]:
    """`all_to_all` that goes on while the caller does other work: what is returned waits for the
    rows and gives them. It must be called on every rank."""
    pending: list[Any] = []
    counts = (receive_counts, send_counts)
    received = labelled(purpose, group, _StartAllToAll.apply, rows, *counts, group, pending)

    def arrived() -> Tensor:
        for work in pending:
            work.wait()
        return received

    return arrived


class _Exchange(torch.autograd.Function):
    """Base of exchanges whose first result's gradient travels the way back."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (received, sent), (gradient, *_) = ctx.counts, grad_outputs
        assert gradient is not None
        return _exchange(gradient, sent, received, ctx.group)[0], None, None, None, None


class _StartAllToAll(_Exchange):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        receive_counts: list[int],
        send_counts: list[int],
        group: ProcessGroup,
        pending: list[Any],
    ) -> Tensor:
        ctx.counts, ctx.group = (receive_counts, send_counts), group
        received, work = _exchange(rows, receive_counts, send_counts, group, async_op=True)
        pending.append(work)
        return received


def all_to_all_with_ids(
    values_N: Tensor,
    ids_N: Tensor,
    receive_counts: list[int],
    send_counts: list[int],
    group: ProcessGroup,
    purpose: Purpose,
) -> tuple[Tensor, Tensor]:
    """`all_to_all` of fp32 or fp64 values with an integer each, below 2^31, in one message.

    Returns both as they arrive, the ids as int64. Differentiable in the values.
    """
    exchange = _AllToAllWithIds.apply
    counts = (receive_counts, send_counts)
    received, ids = labelled(purpose, group, exchange, values_N, ids_N, *counts, group)
    return received, ids


class _AllToAllWithIds(_Exchange):
    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        ids_N: Tensor,
        receive_counts: list[int],
        send_counts: list[int],
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.counts, ctx.group = (receive_counts, send_counts), group
        bits = torch.int64 if values_N.dtype is torch.float64 else torch.int32
        message_N2 = torch.stack((values_N.view(bits), ids_N.to(bits)), dim=1)
        message_N2, _ = _exchange(message_N2, receive_counts, send_counts, group)
        values_N, ids_N = message_N2[:, 0].contiguous().view(values_N.dtype), message_N2[:, 1]
        ids_N = ids_N.to(torch.int64, copy=True)
        ctx.mark_non_differentiable(ids_N)
        return values_N, ids_N


def _exchange(
    rows: Tensor,
    receive_counts: list[int],
    send_counts: list[int],
    group: ProcessGroup,
    async_op: bool = False,
) -> tuple[Tensor, Any]:
    """What arrives, and if asynchronous the work to wait for first."""
    received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    work = dist.all_to_all_single(
        received, rows.contiguous(), receive_counts, send_counts, group=group, async_op=async_op
    )
    return received, work


def sum_shards(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """The sum over `group` of [S, ...], of which each rank gets its shard [S/P, ...]. Gradients are
    gathered."""
    return labelled(
        purpose, group, mappings.reduce_scatter_to_sequence_parallel_region, x, group=group
    )


def exchange_counts(counts_P: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """Tell each rank p the row `counts_P[p]`; returns the rows that the others sent here.

    counts_P: [P, ...] int64, not differentiable.
    """
    counts_P = counts_P.contiguous()
    received = torch.empty_like(counts_P)
    labelled(purpose, group, dist.all_to_all_single, received, counts_P, group=group)
    return received


def sum_over(x: Tensor, *groups: ProcessGroup, purpose: Purpose) -> Tensor:
    """A new tensor: `x` summed over each group in turn. Not differentiable."""
    total = x.detach().clone()
    for group in groups:
        if group.size() > 1:
            labelled(purpose, group, dist.all_reduce, total, op=ReduceOp.SUM, group=group)
    return total


def max_over(x: Tensor, *groups: ProcessGroup, purpose: Purpose) -> Tensor:
    """A new tensor: the elementwise largest `x` of each group in turn. Not differentiable."""
    largest = x.detach().clone()
    for group in groups:
        if group.size() > 1:
            labelled(purpose, group, dist.all_reduce, largest, op=ReduceOp.MAX, group=group)
    return largest


def send(x: Tensor, rank: int, group: ProcessGroup, purpose: Purpose) -> None:
    """Send `x`, contiguous, to a rank of `group`. Not differentiable."""
    labelled(purpose, group, dist.send, x.detach().contiguous(), group=group, group_dst=rank)


def receive(x: Tensor, rank: int, group: ProcessGroup, purpose: Purpose) -> None:
    """Fill `x`, contiguous, with what a rank of `group` sends."""
    labelled(purpose, group, dist.recv, x, group=group, group_src=rank)


def broadcast(x: Tensor, rank: int, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """The `x` of a rank of `group` on all of them, written into theirs. Not differentiable."""
    if group.size() > 1:
        labelled(purpose, group, dist.broadcast, x, group=group, group_src=rank)
    return x


def gather_shards(shard: Tensor, dim: int, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """The full tensor whose equal shards along `dim` lie over `group`. Not differentiable."""
    shard = shard.detach().contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    labelled(purpose, group, dist.all_gather, shards, shard, group=group)
    return torch.cat(shards, dim)

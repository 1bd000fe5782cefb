"""One half of a transformer block: attention or feed-forward, dense or routed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.dispatch.dispatcher import run_replicated, run_sharded
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.context import Context
from uoe_parallel.parallel import comm
from uoe_parallel.routing.balance import load_balance_loss, z_loss
from uoe_parallel.routing.router import Router, Routing
from uoe_parallel.routing.statistics import RoutingStatistics
from uoe_parallel.routing.tape import RouteTape


class Union(Protocol):
    """Experts whose union is one dense block, such as `UnionOfMLPExperts`."""

    num_experts: int

    @property
    def output_bias(self) -> Tensor | None: ...

    def __call__(
        self,
        x: Tensor,
        gates_N: Tensor | None = None,
        assignment: Assignment | None = None,
        *,
        documents: Documents,
    ) -> Tensor: ...


class _AttachLoss(torch.autograd.Function):
    """Passes `y` on and, in backward, hands `loss` a gradient of one.

    A balance loss rides on the hidden states instead of being returned through every layer, so
    that layers keep one tensor in and one tensor out.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.shape, loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss_like
        return grad_outputs[0], torch.ones(shape, dtype=dtype, device=device)


class DenseBlock(nn.Module):
    """The dense block: all experts of a union on, no router."""

    def __init__(self, experts: nn.Module, *, group: ProcessGroup, sequence_parallel: bool) -> None:
        super().__init__()
        self.experts = experts
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        """[S or S/P, B, D] to the same shape."""
        return self.add_bias(self.experts(x_SBD, documents=context.documents))

    def add_bias(self, y_SBD: Tensor) -> Tensor:
        """Add the union's one output bias: once, whatever the routing."""
        experts: Union = self.experts  # pyright: ignore[reportAssignmentType]
        bias = experts.output_bias
        if bias is None:
            return y_SBD
        return y_SBD + (comm.sum_gradient(bias, self.group) if self.sequence_parallel else bias)


class RoutedBlock(DenseBlock):
    """A union of experts behind a router: scores, routing, dispatch, experts, combine.

    `experts` lie over `expert_group`: the tensor group `group`, or more ranks around it that hold
    other sequences. `loss_weight_per_sequence` turns sums of a sequence's balance losses into the
    share of the step's loss that this rank's backward pass must carry: data-parallel size / global
    batch size under gradient averaging. A `tape` sees the masks of training passes and may replace
    them.
    """

    def __init__(
        self,
        experts: nn.Module,
        routing: RoutingConfig,
        *,
        hidden_size: int,
        num_experts: int,
        dtype: torch.dtype,
        router_init: Callable[[Tensor], Tensor],
        loss_weight_per_sequence: float,
        group: ProcessGroup,
        expert_group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(experts, group=group, sequence_parallel=sequence_parallel)
        self.expert_group = expert_group
        self.spreads_tokens = sequence_parallel or expert_group.size() > group.size()
        self.routing = routing
        self.router = Router(routing)
        weight = router_init(torch.empty(num_experts, hidden_size))
        self.router_weight = nn.Parameter(weight.to(dtype))
        self.loss_weight = loss_weight_per_sequence
        self.statistics = RoutingStatistics(num_experts)
        self.tape: RouteTape | None = None

    def forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        """[S or S/P, B, D] to the same shape. Collective over the tensor and expert groups."""
        scores_SBE = self._scores(x_SBD)
        mask_SBE = self._select(scores_SBE)
        if self.training and self.tape is not None:
            mask_SBE = self.tape(mask_SBE)
        routing = Routing(mask_SBE, self.router.gate(scores_SBE))
        y_SBD = self.add_bias(self._run(x_SBD, routing, context))
        # Also the first of two passes when a layer is recomputed: losses and statistics are the
        # second's, the only one that has a backward pass.
        if not torch.is_grad_enabled():
            return y_SBD
        return _AttachLoss.apply(y_SBD, self._losses(scores_SBE, routing.mask_SBE))

    def _run(self, x_SBD: Tensor, routing: Routing, context: Context) -> Tensor:
        is_wide = self.expert_group.size() > self.group.size()
        documents = context.expert_group if is_wide else context.documents
        experts, group = partial(self.experts, documents=documents), self.expert_group
        if not self.spreads_tokens:
            return run_replicated(x_SBD, routing, experts, group, documents)
        return run_sharded(x_SBD, routing, experts, group, self.group.size(), documents)

    def _scores(self, x_SBD: Tensor) -> Tensor:
        precise = torch.promote_types(x_SBD.dtype, torch.float32)
        # Made precise first, so that its gradient is summed before it is rounded.
        weight = self.router_weight.to(precise)
        if self.sequence_parallel:
            weight = comm.sum_gradient(weight, self.group)
        return F.linear(x_SBD.to(precise), weight)

    @torch.no_grad()
    def _select(self, scores_SBE: Tensor) -> Tensor:
        """The mask of this rank's tokens, chosen from whole sequences where the rule needs them."""
        select = self.router.select
        if select.per_token or not self.sequence_parallel:
            return select(scores_SBE)
        whole_SBE = comm.gather_shards(scores_SBE, 0, self.group)
        return select(whole_SBE).chunk(self.group.size())[self.group.rank()]

    def _losses(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        """This rank's share of the weighted balance losses of the step; counts statistics."""
        local_length, batch, _ = mask_SBE.shape
        shards = self.group.size() if self.sequence_parallel else 1
        length = local_length * shards
        counts_BE = mask_SBE.sum(0)
        if self.sequence_parallel:
            counts_BE = comm.sum_over(counts_BE, self.group)
        balance = load_balance_loss(scores_SBE, counts_BE, length)
        z = z_loss(scores_SBE, length)
        gates_SBE = self.router.gate(scores_SBE.detach())
        self.statistics.add(mask_SBE, gates_SBE, None, balance, z, batch / shards, None)
        weighted = self.routing.balance_loss * balance + self.routing.z_loss * z
        return self.loss_weight * weighted

"""The two parallel forms of a routed block (UoE's section 4), around any kind of expert."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.dispatch.plan import plan_exchange, plan_local
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.documents import Documents
from uoe_parallel.parallel import comm
from uoe_parallel.routing.router import Routing

Experts = Callable[[Tensor, Tensor, Assignment], Tensor]
"""(rows [R, D], gates [N], assignment) to the gated sum of each row's experts [R, D]."""


def run_sharded(
    x_SBD: Tensor,
    routing: Routing,
    experts: Experts,
    group: ProcessGroup,
    num_shards: int,
    documents: Documents,
) -> Tensor:
    """Tokens spread over the ranks: rows travel to the experts and sums travel back.

    x_SBD: this rank's tokens, one of `num_shards` shards of its sequences. `documents`: of all
    sequences of the group, run of `num_shards` ranks after run. Each row crosses to a rank at most
    once, however many of its experts live there; those add their results up before the one row
    returns. Collective over the group, forward and backward, also for ranks without a
    token.
    """
    plan = plan_exchange(routing.mask_SBE, group, num_shards, documents)
    x_TD = x_SBD.flatten(0, 1)
    gates_TE = routing.gates_SBE.flatten(0, 1)
    rows_RD = comm.all_to_all(
        x_TD.index_select(0, plan.sent_token), plan.receive_rows, plan.send_rows, group
    )
    sent_gates = gates_TE[plan.pair_token, plan.pair_expert]
    gates_N = comm.all_to_all(sent_gates, plan.receive_pairs, plan.send_pairs, group)
    sums_RD = experts(rows_RD, gates_N[plan.order], plan.assignment)
    returned = comm.all_to_all(sums_RD, plan.send_rows, plan.receive_rows, group)
    y_TD = returned.new_zeros(plan.num_tokens, returned.shape[1])
    return y_TD.index_add(0, plan.sent_token, returned).view_as(x_SBD)


def run_replicated(
    x_SBD: Tensor,
    routing: Routing,
    experts: Experts,
    group: ProcessGroup,
    documents: Documents,
) -> Tensor:
    """Tokens on every rank: each computes its own experts, the sums are all-reduced.

    x_SBD and the routing are the same on all ranks of the group. What enters a rank's experts
    has its gradient summed over the group. The form of one rank alone and of decoding.
    """
    assignment, token_N, expert_N = plan_local(
        routing.mask_SBE, group.rank(), group.size(), documents
    )
    x_TD = comm.sum_gradient(x_SBD, group).flatten(0, 1)
    gates_TE = comm.sum_gradient(routing.gates_SBE, group).flatten(0, 1)
    sums_TD = experts(x_TD, gates_TE[token_N, expert_N], assignment)
    return comm.sum_forward(sums_TD, group).view_as(x_SBD)

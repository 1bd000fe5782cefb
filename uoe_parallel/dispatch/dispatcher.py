"""The parallel forms of a routed block (UoE's section 4), around any kind of expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.dispatch.plan import plan_arrivals, plan_exchange, plan_local
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.documents import Documents
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose
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
    returns. Collective over the group, forward and backward, also for ranks without a token.
    """
    plan = plan_exchange(routing.mask_SBE, group)
    rows = comm.start_all_to_all(
        plan.sent.gather(x_SBD.flatten(0, 1)),
        plan.receive_rows,
        plan.send_rows,
        group,
        Purpose.DISPATCH_ROWS,
    )
    # Which pairs they are for is said and sorted while rows travel.
    gates_N, ids_N = comm.all_to_all_with_ids(
        _pick(routing.gates_SBE, plan.pair_token, plan.pair_expert),
        plan.pair_ids,
        plan.receive_pairs,
        plan.send_pairs,
        group,
        Purpose.DISPATCH_GATES,
    )
    length, batch, _ = x_SBD.shape
    assignment, order = plan_arrivals(plan, ids_N, (length, batch), num_shards, documents)
    sums_RD = experts(rows(), gates_N.gather(0, order), assignment)
    returned = comm.all_to_all(
        sums_RD, plan.send_rows, plan.receive_rows, group, Purpose.COMBINE_ROWS
    )
    return plan.sent.sum(returned).view_as(x_SBD)


def run_gathered(
    x_SBD: Tensor,
    routing: Routing,
    experts: Experts,
    group: ProcessGroup,
    num_shards: int,
    documents: Documents,
) -> Tensor:
    """Tokens spread over the ranks, all of which every expert needs: rows are gathered, each rank
    computes its own experts, and the sums are reduced and scattered.

    For attention that routes queries only. Arguments as of `run_sharded`; the experts get the rows
    of all sequences, [S, B] of `documents`. Of gates and masks a rank gets its own experts' only.
    Collective over the group, forward and backward.
    """
    runs = group.size() // num_shards
    mask_SBE = _to_experts(routing.mask_SBE.to(torch.uint8), group)
    gates_SBE = _to_experts(routing.gates_SBE, group)
    assignment, expert_N = plan_local(_side_by_side(mask_SBE, runs) > 0, documents)
    gates_N = _pick(_side_by_side(gates_SBE, runs), assignment.token_N, expert_N)
    purpose = Purpose.GATHERED_ROWS
    whole_SBD = _side_by_side(comm.gather_sequence(x_SBD, group, purpose), runs)
    sums_TD = experts(whole_SBD.flatten(0, 1), gates_N, assignment)
    return comm.sum_shards(_in_turn(sums_TD.view_as(whole_SBD), runs), group, purpose)


def _to_experts(x_SBE: Tensor, group: ProcessGroup) -> Tensor:
    """[S, B, E] of this rank's tokens to [P x S, B, E / P] of its experts, rank after rank."""
    length, num_ranks = len(x_SBE), group.size()
    by_rank = x_SBE.unflatten(-1, (num_ranks, -1)).permute(2, 0, 1, 3).flatten(0, 1)
    counts = [length] * num_ranks
    return comm.all_to_all(by_rank, counts, counts, group, Purpose.GATHERED_GATES)


def _side_by_side(x: Tensor, runs: int) -> Tensor:
    """Shards of the sequences of `runs` runs of ranks, [P x S, B, ...] in the order of the ranks,
    to whole sequences, [S, B, ...] of all runs."""
    return x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1, 2)


def _in_turn(x: Tensor, runs: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return x.unflatten(1, (runs, -1)).transpose(0, 1).flatten(0, 1)


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
    num_local = routing.mask_SBE.shape[2] // group.size()
    own = slice(group.rank() * num_local, (group.rank() + 1) * num_local)
    assignment, expert_N = plan_local(routing.mask_SBE[..., own], documents)
    x_TD = comm.sum_gradient(x_SBD, group, Purpose.REPLICATED_ROWS).flatten(0, 1)
    gates_SBE = comm.sum_gradient(routing.gates_SBE, group, Purpose.REPLICATED_GATES)[..., own]
    sums_TD = experts(x_TD, _pick(gates_SBE, assignment.token_N, expert_N), assignment)
    return comm.sum_forward(sums_TD, group, Purpose.REPLICATED_ROWS).view_as(x_SBD)


def _pick(gates_SBE: Tensor, token_N: Tensor, expert_N: Tensor) -> Tensor:
    """Of each pair, no two of which are the same: [N]. Differentiable."""
    # Not by two indices, whose gradient is sorted first: pairs might be the same.
    return gates_SBE.reshape(-1).gather(0, token_N * gates_SBE.shape[-1] + expert_N)

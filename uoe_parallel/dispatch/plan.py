"""The plan of one exchange: who sends which rows where, and what each rank's experts take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.experts.assignment import Assignment, sort_pairs
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.rows import RowCopies
from uoe_parallel.parallel import comm


@dataclass(frozen=True)
class RoutePlan:
    """Built once per forward pass of a block; serves dispatch, combine and their backwards."""

    assignment: Assignment
    sent: RowCopies
    """A copy of a local token for each row this rank sends, by destination, then token."""
    send_rows: list[int]
    receive_rows: list[int]
    pair_token: Tensor
    """Local token of each pair this rank sends, by destination, token, expert: int64."""
    pair_expert: Tensor
    """Expert (numbered over the block) of each pair this rank sends: int64."""
    send_pairs: list[int]
    receive_pairs: list[int]
    order: Tensor
    """Received pair of each pair of the assignment: int64."""


@torch.no_grad()
def plan_exchange(
    mask_SBE: Tensor, group: ProcessGroup, num_shards: int, documents: Documents
) -> RoutePlan:
    """Plan an all-to-all over `group` for tokens that are spread over it.

    mask_SBE: bool. Every run of `num_shards` ranks of the group shares B sequences, each rank a
    shard of S positions: rank p holds positions [q S, (q + 1) S), q = p % num_shards, of the
    sequences of run p // num_shards, and experts [p E/P, (p + 1) E/P). A token's row goes once to
    every rank that holds one of its experts. `documents`: of the sequences of all runs, in their
    order. Collective over the group: one exchange of counts, one of expert ids.
    """
    length, batch, num_experts = mask_SBE.shape
    num_ranks, num_local = group.size(), num_experts // group.size()
    num_tokens = length * batch
    mask_PTE = mask_SBE.view(num_tokens, num_ranks, num_local).transpose(0, 1)
    visits_PT = mask_PTE.any(-1)
    _, sent_token = visits_PT.nonzero(as_tuple=True)
    destination, pair_token, local_expert = mask_PTE.nonzero(as_tuple=True)

    counts_P2 = torch.stack((visits_PT.sum(1), mask_PTE.sum((1, 2))), dim=1)
    received_P2 = comm.exchange_counts(counts_P2, group)
    # The one copy to the host: the sizes of every later exchange.
    (send_rows, send_pairs), (receive_rows, receive_pairs) = (
        torch.stack((counts_P2, received_P2)).transpose(1, 2).tolist()
    )

    ids = comm.all_to_all(pair_token * num_local + local_expert, receive_pairs, send_pairs, group)
    source = torch.repeat_interleave(received_P2[:, 1], output_size=ids.shape[0])
    # As they come, tokens of a sequence are ordered by position: its shards follow each other.
    token_N = source * num_tokens + ids // num_local
    position_N = source % num_shards * length + ids // num_local // batch
    sequence_N = source // num_shards * batch + ids // num_local % batch
    is_new_row = torch.ones_like(token_N, dtype=torch.bool)
    is_new_row[1:] = token_N[1:] != token_N[:-1]
    assignment, order = sort_pairs(
        row_N=is_new_row.cumsum(0) - 1,
        expert_N=ids % num_local,
        token_N=position_N * documents.shape[1] + sequence_N,
        documents=documents,
        num_rows=sum(receive_rows),
        num_experts=num_local,
    )
    return RoutePlan(
        assignment=assignment,
        sent=RowCopies.of(sent_token, num_tokens),
        send_rows=send_rows,
        receive_rows=receive_rows,
        pair_token=pair_token,
        pair_expert=destination * num_local + local_expert,
        send_pairs=send_pairs,
        receive_pairs=receive_pairs,
        order=order,
    )


@torch.no_grad()
def plan_local(mask_SBE: Tensor, documents: Documents) -> tuple[Assignment, Tensor]:
    """The pairs of this rank's experts when the rank holds every token.

    mask_SBE: bool, of this rank's experts only. Rows are the tokens themselves, so nothing moves.
    Returns the assignment and, in its order, each pair's expert (int64).
    """
    length, batch, num_experts = mask_SBE.shape
    # Places in [E, B, S] are in the order of an assignment's pairs.
    place_N = mask_SBE.permute(2, 1, 0).reshape(-1).nonzero().squeeze(1)
    token_N = place_N % length * batch + place_N // length % batch
    expert_N = place_N // (length * batch)
    assignment = Assignment(
        copies=RowCopies.of(token_N, length * batch),
        expert_counts_E=torch.bincount(expert_N, minlength=num_experts),
        token_N=token_N,
        documents=documents,
    )
    return assignment, expert_N

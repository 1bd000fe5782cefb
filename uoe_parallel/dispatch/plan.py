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
from uoe_parallel.parallel.purposes import Purpose


@dataclass(frozen=True)
class RoutePlan:
    """Built once per forward pass of a block; serves dispatch, combine and their backwards."""

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
    num_local: int
    """Experts of a rank."""

    @property
    def pair_ids(self) -> Tensor:
        """What says to the ranks of the experts which pairs they get: int64."""
        return self.pair_token * self.num_local + self.pair_expert % self.num_local


@torch.no_grad()
def plan_exchange(mask_SBE: Tensor, group: ProcessGroup) -> RoutePlan:
    """Plan an all-to-all over `group` for tokens that are spread over it.

    mask_SBE: bool, of this rank's tokens. Rank p holds experts [p E/P, (p + 1) E/P). A token's row
    goes once to every rank that holds one of its experts. Collective over the group: one exchange
    of counts.
    """
    num_tokens = mask_SBE.shape[0] * mask_SBE.shape[1]
    num_ranks, num_local = group.size(), mask_SBE.shape[2] // group.size()
    mask_PTE = mask_SBE.view(num_tokens, num_ranks, num_local).transpose(0, 1)
    visits_PT = mask_PTE.any(-1)
    _, sent_token = visits_PT.nonzero(as_tuple=True)
    destination, pair_token, local_expert = mask_PTE.nonzero(as_tuple=True)

    counts_P2 = torch.stack((visits_PT.sum(1), mask_PTE.sum((1, 2))), dim=1)
    received_P2 = comm.exchange_counts(counts_P2, group, Purpose.DISPATCH_COUNTS)
    # The one copy to the host: the sizes of every later exchange.
    (send_rows, send_pairs), (receive_rows, receive_pairs) = (
        torch.stack((counts_P2, received_P2)).transpose(1, 2).tolist()
    )
    return RoutePlan(
        sent=RowCopies(sent_token, num_tokens),
        send_rows=send_rows,
        receive_rows=receive_rows,
        pair_token=pair_token,
        pair_expert=destination * num_local + local_expert,
        send_pairs=send_pairs,
        receive_pairs=receive_pairs,
        num_local=num_local,
    )


@torch.no_grad()
def plan_arrivals(
    plan: RoutePlan, ids_N: Tensor, shape: tuple[int, int], num_shards: int, documents: Documents
) -> tuple[Assignment, Tensor]:
    """What this rank's experts take of the pairs that arrive.

    ids_N: int64, the `pair_ids` of all ranks for this one, in rank order. shape: (S, B) of every
    rank's tokens. Every run of `num_shards` ranks of the group shares B sequences: rank p holds
    positions [q S, (q + 1) S), q = p % num_shards, of the sequences of run p // num_shards.
    `documents`: of the sequences of all runs, in their order. Returns the assignment and which
    arrived pair each of its pairs is (int64).
    """
    length, batch = shape
    counts_P = torch.tensor(plan.receive_pairs, device=ids_N.device)
    source_N = torch.repeat_interleave(counts_P, output_size=len(ids_N))
    token_N = ids_N // plan.num_local
    # As they come, tokens of a sequence are ordered by position: its shards follow each other.
    position_N = source_N % num_shards * length + token_N // batch
    sequence_N = source_N // num_shards * batch + token_N % batch
    token_N = source_N * (length * batch) + token_N
    is_new_row = torch.ones_like(token_N, dtype=torch.bool)
    is_new_row[1:] = token_N[1:] != token_N[:-1]
    return sort_pairs(
        row_N=is_new_row.cumsum(0) - 1,
        expert_N=ids_N % plan.num_local,
        token_N=position_N * documents.shape[1] + sequence_N,
        documents=documents,
        num_rows=sum(plan.receive_rows),
        num_experts=plan.num_local,
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
        copies=RowCopies(token_N, length * batch),
        expert_counts_E=torch.bincount(expert_N, minlength=num_experts),
        token_N=token_N,
        documents=documents,
    )
    return assignment, expert_N

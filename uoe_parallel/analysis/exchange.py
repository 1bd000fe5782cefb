"""How many rows and pairs the ranks of an expert group send each other, planned or drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from uoe_parallel.dispatch.plan import RoutePlan


@dataclass(frozen=True)
class ExchangeSizes:
    """What one exchange of a routed block moves, as one rank of its group sees it: for each rank of
    the group, itself included, a number of rows (tokens) and of (row, expert) pairs."""

    send_rows: list[int]
    receive_rows: list[int]
    send_pairs: list[int]
    receive_pairs: list[int]

    @classmethod
    def of_plan(cls, plan: RoutePlan) -> ExchangeSizes:
        """Of an exchange that took place."""
        return cls(plan.send_rows, plan.receive_rows, plan.send_pairs, plan.receive_pairs)

    @classmethod
    def of_masks(cls, mask_of: Callable[[int], Tensor], rank: int, num_ranks: int) -> ExchangeSizes:
        """Of masks that are asked for one by one: `mask_of(p)` is rank p's own, bool [..., E].

        rank: of this one in the group, whose rank p holds experts [p E/P, (p + 1) E/P).
        """
        sent = torch.zeros(2, num_ranks, dtype=torch.int64)
        received = torch.zeros_like(sent)
        for source in range(num_ranks):
            mask_TPE = mask_of(source).flatten(0, -2).unflatten(1, (num_ranks, -1))
            if source == rank:
                sent = torch.stack((mask_TPE.any(-1).sum(0), mask_TPE.sum((0, 2))))
            mine_TE = mask_TPE[:, rank]
            received[:, source] = torch.stack((mine_TE.any(-1).sum(), mine_TE.sum()))
        (send_rows, send_pairs), (receive_rows, receive_pairs) = sent.tolist(), received.tolist()
        return cls(send_rows, receive_rows, send_pairs, receive_pairs)


def sample_exchange(
    *,
    tokens: int,
    num_experts: int,
    top_k: int,
    shared: Collection[int] = (),
    rank: int,
    num_ranks: int,
    seed: int,
    name: str = "",
    skew: float = 0.0,
) -> ExchangeSizes:
    """The sizes of a drawn exchange: each token of each rank chooses `top_k` of the experts, beside
    the shared ones that all visit.

    tokens: of each rank. Choices are independent and without repetition: even, or with a `skew`
    of Zipf's law, under which the i-th most popular expert is i^-skew times as likely as the first.
    What a rank's tokens choose depends on (seed, name, its place in the group) alone, so that all
    ranks of a group draw one and the same exchange, each for itself, with one rank's choices in
    memory at a time.
    """
    assert num_experts % num_ranks == 0 and top_k <= num_experts - len(shared)
    popular_E = torch.randperm(num_experts, generator=_generator(f"{seed}/{name}/experts"))
    rates_E = (1.0 + popular_E).pow(-skew)
    shared_E = torch.tensor([expert in shared for expert in range(num_experts)])

    def mask_of(source: int) -> Tensor:
        generator = _generator(f"{seed}/{name}/{source}")
        # Of clocks that tick at these rates, the first to tick are a weighted draw.
        ticks_TE = torch.empty(tokens, num_experts).exponential_(generator=generator) / rates_E
        ticks_TE[:, shared_E] = torch.inf
        chosen_TK = ticks_TE.topk(top_k, largest=False).indices
        mask_TE = torch.zeros(tokens, num_experts, dtype=torch.bool)
        return mask_TE.scatter_(1, chosen_TK, True) | shared_E

    return ExchangeSizes.of_masks(mask_of, rank, num_ranks)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

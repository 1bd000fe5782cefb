"""A routed feed-forward block under skewed routing, against even routing of as many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.benchmark.session import Session, Sizes
from uoe_parallel.benchmark.timing import ratios, time_in_turn
from uoe_parallel.model.block import RoutedBlock

SKEWS = 10


def even_mask(sizes: Sizes) -> Tensor:
    """bool [S, B, n]: every token takes `top_k` random experts, and every expert equally many
    tokens, if n divides their number."""
    generator = torch.Generator().manual_seed(0)
    # Of n tokens each takes the same choice, turned by one expert more: together, each expert k
    # times.
    groups = -(-sizes.tokens // sizes.experts)
    choices_Gn = torch.rand(groups, sizes.experts, generator=generator).argsort(1)
    turns_n11 = torch.arange(sizes.experts).view(-1, 1, 1)
    chosen_TK = (choices_Gn[:, : sizes.top_k] + turns_n11).flatten(0, 1) % sizes.experts
    order_T = torch.randperm(sizes.tokens, generator=generator)
    return _mask(chosen_TK[: sizes.tokens][order_T], sizes)


def skewed_mask(sizes: Sizes, seed: int) -> Tensor:
    """As `even_mask`, but experts are taken by a law of Zipf's with a random exponent, and some,
    a quarter of them if `top_k` leaves so many, by no token."""
    generator = torch.Generator().manual_seed(seed)
    exponent = 0.5 + float(torch.rand((), generator=generator))
    popular_n = torch.randperm(sizes.experts, generator=generator)
    rates_n = (1.0 + popular_n).pow(-exponent)
    empty = min(max(1, sizes.experts // 4), sizes.experts - sizes.top_k)
    rates_n[popular_n >= sizes.experts - empty] = 0
    # Of clocks that tick at these rates, the first to tick are a weighted draw.
    ticks_Tn = torch.empty(sizes.tokens, sizes.experts).exponential_(generator=generator) / rates_n
    return _mask(ticks_Tn.topk(sizes.top_k, largest=False).indices, sizes)


def forced(mask_SBE: Tensor) -> Callable[[Tensor], Tensor]:
    """A tape that puts a mask in the place of whatever the block chose."""
    return lambda chosen_SBE: mask_SBE.to(chosen_SBE.device)


def measure(session: Session) -> list[dict[str, Any]]:
    """An entry for even routing and for each of ten skews, forward and backward: "routing",
    "rows" (pairs of a token and an expert, the same for all), "largest_share" of the rows that one
    expert takes, "empty_experts", "seconds" of each round, and "ratio_to_even", the median with its
    spread. Of the routing of all ranks together."""
    sizes, groups = session.sizes, session.groups
    masks = {"even": even_mask(sizes)}
    masks |= {f"skew {seed}": skewed_mask(sizes, seed) for seed in range(SKEWS)}
    block = session.feed_forward(sizes, routed=True)
    assert isinstance(block, RoutedBlock)
    x_SBD = session.hidden_states(sizes, seed=1).requires_grad_()
    upstream_SBD = session.hidden_states(sizes, seed=2)
    context = session.context(sizes)

    def run(mask_SBE: Tensor) -> None:
        for leaf in (x_SBD, *block.parameters()):
            leaf.grad = None
        block.tape = forced(mask_SBE.chunk(groups.tensor.size())[groups.tensor_rank])
        block(x_SBD, context).backward(upstream_SBD)

    seconds = time_in_turn(
        {name: partial(run, mask_SBE) for name, mask_SBE in masks.items()},
        rounds=session.rounds,
        warmup=session.warmup,
        group=groups.tensor,
        device=session.device,
    )
    entries = []
    for name, mask_SBE in masks.items():
        counts_E = mask_SBE.sum((0, 1))
        entries.append(
            {
                "routing": name,
                "rows": int(counts_E.sum()),
                "largest_share": float(counts_E.max() / counts_E.sum()),
                "empty_experts": int((counts_E == 0).sum()),
                "seconds": seconds[name],
                "ratio_to_even": asdict(ratios(seconds[name], seconds["even"])),
            }
        )
    return entries


def _mask(chosen_TK: Tensor, sizes: Sizes) -> Tensor:
    mask_Tn = torch.zeros(sizes.tokens, sizes.experts, dtype=torch.bool)
    return mask_Tn.scatter_(1, chosen_TK, True).view(sizes.sequence, sizes.batch, -1)

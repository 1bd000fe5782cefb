"""How much a routed block gives a rank to do: drawn up from rates, or counted from real routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb
from typing import TypeVar

from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.traffic import Exchanges, blocks_that_exchange, micro_batches
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.model.block import RoutedBlock, Union
from uoe_parallel.model.language_model import LanguageModel

_T = TypeVar("_T")


@dataclass(frozen=True)
class BlockWork:
    """Of one routed block on one rank in one micro-batch."""

    sent_rows: int
    """Rows that leave for the ranks of its expert group, itself included; 0 where none travel."""
    sent_pairs: int
    """(row, expert) pairs of these."""
    rows: int
    """Rows that its experts are given."""
    run_lengths: tuple[int, ...]
    """Pairs of each of its experts with each document of the group's sequences, by expert."""

    @property
    def pairs(self) -> int:
        """(row, expert) pairs that its experts compute."""
        return sum(self.run_lengths)

    @classmethod
    def of(cls, assignment: Assignment, sizes: ExchangeSizes | None) -> BlockWork:
        """Of a micro-batch that took place; `sizes` of its exchange, None if rows don't travel."""
        return cls(
            sent_rows=0 if sizes is None else sum(sizes.send_rows),
            sent_pairs=0 if sizes is None else sum(sizes.send_pairs),
            rows=assignment.copies.num_rows,
            run_lengths=tuple(assignment.run_lengths_G.tolist()),
        )


Workload = Mapping[str, BlockWork]
"""By the name of each routed block of a stage."""


def expected_work(model: LanguageModel, config: RunConfig) -> Workload:
    """Where every expert is chosen as often as any other and choices don't depend on each other.

    Sequences count as one document each, nothing is dropped, and segments of which nothing is known
    choose like the others."""
    return _of_all(model.routed_blocks(), lambda block: _expected(block, model, config))


def expected_exchanges(model: LanguageModel, config: RunConfig) -> Exchanges:
    """As `expected_work`: what the blocks whose rows travel send in all micro-batches of a step.

    Numbers are rounded for each rank of a group."""
    number = micro_batches(config, model.groups.layout)
    blocks = blocks_that_exchange(model)
    return _of_all(blocks, lambda block: [_expected_exchange(block, model, config)] * number)


def worst_work(model: LanguageModel, config: RunConfig) -> Workload:
    """The most that any routes can bring, each number by itself: where all tokens of the expert
    group choose as many of this rank's experts as they may, and this rank's tokens go to as many
    ranks as they may.

    Selections other than top_k bound no single token's choice: thresholds let all experts in while
    they warm up. Capacities, which would drop some pairs, are not counted on.
    """
    return _of_all(model.routed_blocks(), lambda block: _worst(block, model, config))


def _of_all(blocks: Mapping[str, RoutedBlock], find: Callable[[RoutedBlock], _T]) -> dict[str, _T]:
    """Once for each kind of block, since layers only differ in which kinds they have."""
    found: dict[str, _T] = {}
    for name, block in blocks.items():
        kind = name.rpartition(".")[2]
        if kind not in found:
            found[kind] = find(block)
    return {name: found[name.rpartition(".")[2]] for name in blocks}


@dataclass(frozen=True)
class _Sizes:
    """What both need."""

    sequences: int
    """Of the group."""
    length: int
    own_tokens: int
    """That this rank sends, 0 if they don't travel."""
    shared: list[list[bool]]
    """Of each rank of the group, which of its experts are shared."""

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return len(self.shared[0])

    def shared_of(self, rank: int) -> int:
        """How many experts of a rank are shared."""
        return sum(self.shared[rank])


def _sizes(block: RoutedBlock, model: LanguageModel, config: RunConfig) -> _Sizes:
    router, ranks = block.router, block.expert_group.size()
    local = router.num_experts // ranks
    batch, length = config.training.micro_batch_size, config.model.sequence_length
    replicas = ranks // model.groups.tensor.size()
    experts: Union = block.experts  # pyright: ignore[reportAssignmentType]
    travels = block.spreads_tokens and not experts.needs_all_rows
    return _Sizes(
        sequences=batch * replicas,
        length=length,
        own_tokens=batch * length // block.num_shards if travels else 0,
        shared=[
            [expert in router.shared for expert in range(rank * local, (rank + 1) * local)]
            for rank in range(ranks)
        ],
    )


def _visits(block: RoutedBlock, sizes: _Sizes) -> list[float]:
    """The chance of a token to have an expert on each rank of the group."""
    routed, chosen = block.router.num_routed, block.routing.chosen_experts

    def visits(shared: int) -> float:
        return 1.0 if shared else 1 - comb(routed - sizes.local, chosen) / comb(routed, chosen)

    return [visits(sum(shared)) for shared in sizes.shared]


def _expected_exchange(
    block: RoutedBlock, model: LanguageModel, config: RunConfig
) -> ExchangeSizes:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    tokens, share = sizes.own_tokens, block.routing.chosen_experts / block.router.num_routed
    rows = [round(tokens * chance) for chance in _visits(block, sizes)]
    pairs = [
        round(tokens * sum(1.0 if is_shared else share for is_shared in experts))
        for experts in sizes.shared
    ]
    return ExchangeSizes(rows, [rows[rank]] * len(rows), pairs, [pairs[rank]] * len(pairs))


def _expected(block: RoutedBlock, model: LanguageModel, config: RunConfig) -> BlockWork:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    routed, chosen = block.router.num_routed, block.routing.chosen_experts
    visits = _visits(block, sizes)
    tokens = sizes.sequences * sizes.length
    part = round(sizes.length * chosen / routed)
    return BlockWork(
        sent_rows=round(sizes.own_tokens * sum(visits)),
        sent_pairs=sizes.own_tokens * (chosen + len(block.router.shared)),
        rows=round(tokens * visits[rank]) if sizes.own_tokens else tokens,
        run_lengths=tuple(
            sizes.length if is_shared else part
            for is_shared in sizes.shared[rank]
            for _ in range(sizes.sequences)
        ),
    )


def _worst(block: RoutedBlock, model: LanguageModel, config: RunConfig) -> BlockWork:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    routed, chosen = block.router.num_routed, block.routing.chosen_experts
    ranks, shared = len(sizes.shared), len(block.router.shared)
    free = _free_to_choose(block, config)
    own_length = sizes.length // block.num_shards
    own_free = sizes.own_tokens * min(free, own_length) // own_length
    here = min(chosen, sizes.local - sizes.shared_of(rank))
    whole = sizes.shared_of(rank) + here
    lengths = [sizes.length] * whole + [free] * (sizes.local - whole)
    visited = min(ranks, chosen + shared)
    return BlockWork(
        sent_rows=sizes.own_tokens * visited + own_free * (ranks - visited),
        sent_pairs=sizes.own_tokens * (chosen + shared) + own_free * (routed - chosen),
        rows=sizes.sequences * sizes.length,
        run_lengths=tuple(length for length in lengths for _ in range(sizes.sequences)),
    )


def _free_to_choose(block: RoutedBlock, config: RunConfig) -> int:
    """The first tokens of each sequence that may visit any number of experts."""
    routing, length = block.routing, config.model.sequence_length
    if routing.selection == "top_k":
        return 0
    if routing.selection is not None:
        return length
    # Of the segment before the first one nothing is known, and it keeps all experts.
    assert routing.segment_length is not None
    return min(routing.segment_length, length) if config.model.causal else 0

"""How much a routed block gives a rank to do: drawn up from rates, or counted from real routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.traffic import Exchanges, blocks_that_exchange, micro_batches
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.model.block import RoutedBlock, Union
from uoe_parallel.model.language_model import LanguageModel


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

    Sequences count as one document each, and nothing is dropped."""
    return {name: _expected(block, model, config) for name, block in model.routed_blocks().items()}


def worst_work(model: LanguageModel, config: RunConfig) -> Workload:
    """Where all tokens of the expert group choose as many of this rank's experts as they may.

    Capacities, which would drop some of them, are not counted on."""
    return {name: _worst(block, model, config) for name, block in model.routed_blocks().items()}


def expected_exchanges(model: LanguageModel, config: RunConfig) -> Exchanges:
    """As `expected_work`: what the blocks send whose rows travel, in all micro-batches of a step.

    Counts are rounded for each rank of a group."""
    number = micro_batches(config, model.groups.layout)
    return {
        name: [_expected_exchange(block, model, config)] * number
        for name, block in blocks_that_exchange(model).items()
    }


@dataclass(frozen=True)
class _Sizes:
    """What both need."""

    sequences: int
    """Of the group."""
    length: int
    own_tokens: int
    """That this rank sends, 0 if they don't travel."""
    shared_by_rank: list[int]
    """Shared experts of each rank of the group."""
    local: int
    """Experts of a rank."""


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
        shared_by_rank=[
            sum(expert // local == rank for expert in router.shared) for rank in range(ranks)
        ],
        local=local,
    )


def _visits(block: RoutedBlock, sizes: _Sizes) -> list[float]:
    """The chance of a token to have an expert on each rank of the group."""
    routed, chosen = block.router.num_routed, block.routing.chosen_experts

    def visits(shared: int) -> float:
        return 1.0 if shared else 1 - comb(routed - sizes.local, chosen) / comb(routed, chosen)

    return list(map(visits, sizes.shared_by_rank))


def _expected_exchange(
    block: RoutedBlock, model: LanguageModel, config: RunConfig
) -> ExchangeSizes:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    tokens, share = sizes.own_tokens, block.routing.chosen_experts / block.router.num_routed
    rows = [round(tokens * chance) for chance in _visits(block, sizes)]
    pairs = [
        round(tokens * (shared + (sizes.local - shared) * share)) for shared in sizes.shared_by_rank
    ]
    here = len(rows) * [rows[rank]], len(rows) * [pairs[rank]]
    return ExchangeSizes(rows, here[0], pairs, here[1])


def _expected(block: RoutedBlock, model: LanguageModel, config: RunConfig) -> BlockWork:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    routed, chosen = block.router.num_routed, block.routing.chosen_experts
    visits = _visits(block, sizes)
    tokens = sizes.sequences * sizes.length
    shared = sizes.shared_by_rank[rank]
    whole, part = sizes.length, round(sizes.length * chosen / routed)
    lengths = [whole] * shared + [part] * (sizes.local - shared)
    gathers = block.spreads_tokens and sizes.own_tokens == 0
    spread = block.spreads_tokens and not gathers
    return BlockWork(
        sent_rows=round(sizes.own_tokens * sum(visits)),
        sent_pairs=sizes.own_tokens * (chosen + sum(sizes.shared_by_rank)),
        rows=round(tokens * visits[rank]) if spread else tokens,
        run_lengths=tuple(length for length in lengths for _ in range(sizes.sequences)),
    )


def _worst(block: RoutedBlock, model: LanguageModel, config: RunConfig) -> BlockWork:
    sizes, rank = _sizes(block, model, config), block.expert_group.rank()
    shared, chosen = sizes.shared_by_rank[rank], block.routing.chosen_experts
    here = min(chosen, sizes.local - shared)
    lengths = [sizes.length] * (shared + here) + [0] * (sizes.local - shared - here)
    pairs = sizes.own_tokens * (chosen + sum(sizes.shared_by_rank))
    ranks = min(len(sizes.shared_by_rank), chosen + len(block.router.shared))
    return BlockWork(
        sent_rows=sizes.own_tokens * ranks,
        sent_pairs=pairs,
        rows=sizes.sequences * sizes.length,
        run_lengths=tuple(length for length in lengths for _ in range(sizes.sequences)),
    )

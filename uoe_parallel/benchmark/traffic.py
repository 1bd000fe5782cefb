"""Bytes that a routed feed-forward block sends, counted and computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.observe import CollectiveObserver
from uoe_parallel.analysis.traffic import exchange_traffic
from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.benchmark.session import DTYPE, Session
from uoe_parallel.benchmark.skew import even_mask, forced, skewed_mask
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

PURPOSES = ("rows", "counts", "gates and ids")
PHASES = ("forward", "backward")
_PURPOSE_OF = {
    Purpose.DISPATCH_ROWS: "rows",
    Purpose.COMBINE_ROWS: "rows",
    Purpose.DISPATCH_COUNTS: "counts",
    Purpose.DISPATCH_GATES: "gates and ids",
}


def measure(session: Session) -> list[dict[str, Any]]:
    """An entry for even routing and for a skew: what all ranks together send to others, dispatch
    and combine. On two ranks or more.

    "measured_bytes" and "expected_bytes": by phase ("forward", "backward") and `PURPOSES`, as a
    `CollectiveObserver` saw them and as the plan has it. "equal": whether they are the same on
    every rank for every phase and purpose. Both in rows alone: "all_gather_bytes", by phase, of a
    dense block that gathers all rows to all ranks and scatters the sums, and in backward gathers
    its input again, as Megatron's does; "row_per_expert_bytes" of a row for each expert chosen on
    another rank, as a mixture of experts sends. "distinct_remote_ranks": mean over tokens.
    """
    assert session.groups.tensor.size() > 1, "one rank sends nothing"
    masks = {"even": even_mask(session.sizes), "skewed": skewed_mask(session.sizes, seed=0)}
    block = session.feed_forward(session.sizes, routed=True)
    assert isinstance(block, RoutedBlock)
    return [
        {"routing": name, **_figures(session, block, mask_SBE)} for name, mask_SBE in masks.items()
    ]


def _figures(session: Session, block: RoutedBlock, mask_SBE: Tensor) -> dict[str, Any]:
    group, sizes = session.groups.tensor, session.sizes
    rank, num_ranks = group.rank(), group.size()
    shards = mask_SBE.chunk(num_ranks)
    block.tape = forced(shards[rank])
    exchange = ExchangeSizes.of_masks(lambda source: shards[source], rank, num_ranks)
    row = sizes.hidden * DTYPE.itemsize
    gate = torch.promote_types(DTYPE, torch.float32).itemsize
    expected = _by_purpose_planned(exchange_traffic(exchange, "tensor", rank, row, gate))
    measured = _observed(session, block)
    purpose = Purpose.MEASUREMENT
    differs = (measured != expected).any().to(torch.int64)
    differs = comm.max_over(differs, group, purpose=purpose)
    remote_rows = sum(exchange.send_rows) - exchange.send_rows[rank]
    remote_pairs = sum(exchange.send_pairs) - exchange.send_pairs[rank]
    remote = torch.tensor([remote_rows, remote_pairs])
    remote = comm.sum_over(remote, group, purpose=purpose)
    remote_rows, remote_pairs = remote.tolist()
    gathered = (num_ranks - 1) * sizes.tokens * row
    return {
        "measured_bytes": _named(comm.sum_over(measured, group, purpose=purpose)),
        "expected_bytes": _named(comm.sum_over(expected, group, purpose=purpose)),
        "equal": not bool(differs),
        "all_gather_bytes": {"forward": 2 * gathered, "backward": 3 * gathered},
        "row_per_expert_bytes": dict.fromkeys(PHASES, 2 * remote_pairs * row),
        "distinct_remote_ranks": remote_rows / sizes.tokens,
    }


def _observed(session: Session, block: RoutedBlock) -> Tensor:
    """What this rank sends to others, int64 [phases, purposes]."""
    x_SBD = session.hidden_states(session.sizes, seed=1).requires_grad_()
    context = session.context(session.sizes)
    with CollectiveObserver() as forward:
        y_SBD = block(x_SBD, context)
    with CollectiveObserver() as backward:
        y_SBD.backward(session.hidden_states(session.sizes, seed=2))
    return torch.stack([_by_purpose_seen(observer) for observer in (forward, backward)])


def _by_purpose_seen(observer: CollectiveObserver) -> Tensor:
    """Of the all-to-alls, int64 [purposes]."""
    sent = torch.zeros(len(PURPOSES), dtype=torch.int64)
    for (operation, _), calls in observer.calls.items():
        for call in calls if operation == "all_to_all" else ():
            sent[PURPOSES.index(_PURPOSE_OF[call.purpose])] += call.payload - call.kept
    return sent


def _by_purpose_planned(transfers: Iterable[Transfer]) -> Tensor:
    """int64 [phases, purposes]."""
    sent = torch.zeros(len(PHASES), len(PURPOSES), dtype=torch.int64)
    for transfer in transfers:
        place = PHASES.index(transfer.phase), PURPOSES.index(_PURPOSE_OF[transfer.purpose])
        sent[place] += transfer.payload - transfer.kept
    return sent


def _named(sent: Tensor) -> dict[str, dict[str, int]]:
    return {
        phase: dict(zip(PURPOSES, of_phase, strict=True))
        for phase, of_phase in zip(PHASES, sent.tolist(), strict=True)
    }

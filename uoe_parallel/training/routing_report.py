"""Each routed block's expert load since the last report, over all ranks."""

from __future__ import annotations

import torch

from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.training.metrics import load_statistics


def routing_report(
    blocks: dict[str, RoutedBlock], groups: ParallelGroups
) -> dict[str, float | list[float]]:
    """Reduces all blocks' statistics in one collective and resets them. Call on every rank.

    Lists have one entry per routed block, in the order of `blocks`: `load_max_over_mean`,
    `load_entropy` (1 is even), `dropped_share` of pairs, `balance_loss` (per sequence, 1 is even)
    and `z_loss`. Empty without routed blocks.
    """
    if not blocks:
        return {}
    over = [groups.data]
    if groups.layout.sequence_parallel:
        over.append(groups.tensor)
    packed = [block.statistics.pack() for block in blocks.values()]
    totals = comm.sum_over(torch.cat(packed), *over).cpu()
    report: dict[str, list[float]] = {
        name: []
        for name in (
            "load_max_over_mean",
            "load_entropy",
            "dropped_share",
            "balance_loss",
            "z_loss",
        )
    }
    for block, total in zip(
        blocks.values(), totals.split([p.numel() for p in packed]), strict=True
    ):
        block.statistics.reset()
        counts_E, (_, dropped, sequences, balance, z) = total[:-5], total[-5:].tolist()
        max_over_mean, entropy = load_statistics(counts_E)
        report["load_max_over_mean"].append(float(max_over_mean))
        report["load_entropy"].append(float(entropy))
        report["dropped_share"].append(dropped / max(float(counts_E.sum()) + dropped, 1.0))
        report["balance_loss"].append(balance / max(sequences, 1.0))
        report["z_loss"].append(z / max(sequences, 1.0))
    return {**report}

"""Each routed block's expert load since the last report, over all ranks."""

from __future__ import annotations

import torch

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.routing.statistics import RoutingStatistics
from uoe_parallel.training.metrics import load_statistics


def routing_report(
    blocks: dict[str, RoutedBlock],
    config: RunConfig,
    groups: ParallelGroups,
    device: torch.device,
) -> dict[str, float]:
    """Reduces all blocks' statistics in one collective and resets them. Call on every rank, with
    the blocks of its stage.

    For each routed block "<value>/<block>": `load_max_over_mean` and `load_entropy` (1 is even),
    `dropped_share` of pairs, `balance_loss` (a sequence's mean, 1 is even) and `z_loss`; and
    `load_max_over_mean` alone, the largest of all. Empty without routed blocks.
    """
    if not config.routed_blocks:
        return {}
    over = [groups.data, groups.pipe]
    if groups.layout.sequence_parallel:
        over.append(groups.tensor)
    # Blocks of other stages add nothing here.
    elsewhere = {name: RoutingStatistics.zeros(size) for name, size in config.routed_blocks.items()}
    statistics = elsewhere | {name: block.statistics for name, block in blocks.items()}
    packed = [part.pack().to(device) for part in statistics.values()]
    totals = comm.sum_over(torch.cat(packed), *over).cpu().split([p.numel() for p in packed])
    report: dict[str, float] = {}
    for (name, part), total in zip(statistics.items(), totals, strict=True):
        part.reset()
        counts_E, (_, dropped, sequences, balance, z) = total[:-5], total[-5:].tolist()
        max_over_mean, entropy = load_statistics(counts_E)
        report[f"load_max_over_mean/{name}"] = float(max_over_mean)
        report[f"load_entropy/{name}"] = float(entropy)
        report[f"dropped_share/{name}"] = dropped / max(float(counts_E.sum()) + dropped, 1.0)
        report[f"balance_loss/{name}"] = balance / max(sequences, 1.0)
        report[f"z_loss/{name}"] = z / max(sequences, 1.0)
    loads = [value for name, value in report.items() if name.startswith("load_max_over_mean/")]
    return {**report, "load_max_over_mean": max(loads)}

"""The state of routing rules that move once per optimizer step: moved, saved, loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from uoe_parallel.checkpoint import CheckpointReader, Piece
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.routing.running import Running


def move_rules(
    blocks: Mapping[str, RoutedBlock], groups: ParallelGroups, device: torch.device
) -> None:
    """Move every rule by what all ranks observed since the last move, summed as one vector.

    Collective over the ranks that share a stage, which hold the same `blocks`.
    """
    rules = [rule for _, rule in _rules(blocks)]
    if not rules:
        return
    over = [groups.data, groups.tensor] if groups.layout.sequence_parallel else [groups.data]
    observed = torch.cat([rule.observed.to(device) for rule in rules])
    sizes = [rule.observed.numel() for rule in rules]
    totals = comm.sum_over(observed, *over, purpose=Purpose.RULES).split(sizes)
    for rule, total in zip(rules, totals, strict=True):
        rule.to(device)
        rule.move(total)
        rule.reset()


def reset_rules(blocks: Mapping[str, RoutedBlock]) -> None:
    """Forget what was observed since the last move, of a step that is not taken."""
    for _, rule in _rules(blocks):
        rule.reset()


def rule_states(blocks: Mapping[str, RoutedBlock]) -> Iterator[tuple[str, Tensor]]:
    """Every rule's state by the names of checkpoints, "<block>/<level>/<rule>/<name>"."""
    for prefix, rule in _rules(blocks):
        for name, value in rule.state.items():
            yield f"{prefix}/{name}", value


def capture_rules(blocks: Mapping[str, RoutedBlock], groups: ParallelGroups) -> Iterator[Piece]:
    """What this rank has to save of rules: "<block>/<level>/<rule>/<name>", whole tensors. The
    first rank of a stage writes."""
    if groups.tensor_rank == groups.data_rank == 0:
        for prefix, rule in _rules(blocks):
            for name, value in rule.state.items():
                yield Piece.whole(f"{prefix}/{name}", value.detach().cpu().clone())


def restore_rules(blocks: Mapping[str, RoutedBlock], reader: CheckpointReader) -> None:
    """Load what `capture_rules` saved. A rule that the saved run did not have starts afresh."""
    saved = reader.keys()
    for prefix, rule in _rules(blocks):
        if all(f"{prefix}/{name}" in saved for name in rule.state):
            rule.state = {name: reader.read(f"{prefix}/{name}") for name in rule.state}


def _rules(blocks: Mapping[str, RoutedBlock]) -> Iterator[tuple[str, Running]]:
    for name, block in blocks.items():
        for weight, level in block.router.levels.items():
            level_name = weight.removesuffix("router_weight") + "router"
            for rule in level.running:
                yield f"{name}/{level_name}/{type(rule).__name__}", rule

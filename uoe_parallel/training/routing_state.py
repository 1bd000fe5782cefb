"""The state of routing rules that move once per optimizer step: moved and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from uoe_parallel.checkpoint import Piece
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.running_rules import named_rules, rule_states
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose


def move_rules(
    blocks: Mapping[str, RoutedBlock], groups: ParallelGroups, device: torch.device
) -> None:
    """Move every rule by what all ranks observed since the last move, summed as one vector.

    Collective over the ranks that share a stage, which hold the same `blocks`.
    """
    rules = [rule for _, rule in named_rules(blocks)]
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
    for _, rule in named_rules(blocks):
        rule.reset()


def capture_rules(blocks: Mapping[str, RoutedBlock], groups: ParallelGroups) -> Iterator[Piece]:
    """What this rank has to save of rules: "<block>/<level>/<rule>/<name>", whole tensors. The
    first rank of a stage writes."""
    if groups.tensor_rank == groups.data_rank == 0:
        for name, value in rule_states(blocks):
            yield Piece.whole(name, value.detach().cpu().clone())

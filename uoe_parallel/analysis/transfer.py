"""One purpose for which a rank sends, and the groups that it sends in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch.distributed as dist

from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Phase, Purpose

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]


@dataclass(frozen=True)
class Transfer:
    """What a rank puts into all collectives of one purpose in a step."""

    purpose: Purpose
    phase: Phase
    group: str
    """A name of `group_ranks`."""
    operation: Operation
    calls: int
    payload: int
    """Bytes that the rank hands over, padding included: the tensor that it wants summed, its shard
    of what is gathered, the whole of which it keeps a shard, all that it sends to anyone. How
    often they cross a link is the algorithm's matter."""
    kept: int = 0
    """Bytes of an all-to-all's payload that are addressed to the rank itself."""


def times(transfers: Iterable[Transfer], number: int) -> list[Transfer]:
    """The same `number` times."""
    return [
        replace(t, calls=t.calls * number, payload=t.payload * number, kept=t.kept * number)
        for t in transfers
    ]


def merged(transfers: Iterable[Transfer]) -> list[Transfer]:
    """One for each purpose, phase, group and operation, in order of first appearance."""
    sums: dict[tuple[str, str, str, str], Transfer] = {}
    for t in transfers:
        key = (t.purpose, t.phase, t.group, t.operation)
        if (total := sums.get(key)) is not None:
            t = replace(
                t,
                calls=total.calls + t.calls,
                payload=total.payload + t.payload,
                kept=total.kept + t.kept,
            )
        sums[key] = t
    return list(sums.values())


def group_ranks(groups: ParallelGroups) -> dict[str, tuple[int, ...]]:
    """The ranks of every group that this rank sends in, by name.

    Next to the axes: "model", the tensor groups of all stages of its data-parallel replica;
    "next_stage" and "previous_stage", itself and its neighbour, and "tied_stages", the first and
    the last one, where there are any; "expert" and "expert_data" only where they differ from
    "tensor" and "data".
    """
    layout = groups.layout
    axes = ["world", "tensor", "data", "pipe"]
    axes += ["expert", "expert_data"] if layout.has_wide_experts else []
    ranks = {axis: tuple(dist.get_process_group_ranks(getattr(groups, axis))) for axis in axes}
    stage, pipe = groups.stage, ranks["pipe"]
    # The tensor groups that stand where its own does in each stage.
    ranks["model"] = tuple(r + p - pipe[stage] for p in pipe for r in ranks["tensor"])
    if not groups.is_last_stage:
        ranks["next_stage"] = pipe[stage : stage + 2]
    if not groups.is_first_stage:
        ranks["previous_stage"] = pipe[stage - 1 : stage + 1]
    if len(pipe) > 1 and (groups.is_first_stage or groups.is_last_stage):
        ranks["tied_stages"] = (pipe[0], pipe[-1])
    return ranks


def group_sizes(groups: ParallelGroups) -> dict[str, int]:
    """Of the same groups, how many ranks each has."""
    layout = groups.layout
    axes = ["world", "tensor", "data", "pipe"]
    axes += ["expert", "expert_data"] if layout.has_wide_experts else []
    sizes = {axis: getattr(groups, axis).size() for axis in axes}
    sizes["model"] = layout.tensor * layout.pipeline
    return sizes | dict.fromkeys(("next_stage", "previous_stage", "tied_stages"), 2)

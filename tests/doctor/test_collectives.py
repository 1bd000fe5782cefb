"""Every group's collectives are tried, and wrong results are seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.harness import Ranks
from uoe_parallel.config.schema import ParallelConfig
from uoe_parallel.doctor.collectives import OPERATIONS, axes, check_results, time_collectives
from uoe_parallel.doctor.faults import Fault
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import ParallelGroups, start_groups
from uoe_parallel.parallel.layout import ParallelLayout

MIXED = ParallelConfig(tensor=2, pipeline=2)
BROKEN = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "recv": "send",
}
"""Functions of torch and the names of what they are for."""
WIDE = ParallelConfig(tensor=1, expert=2, zero_stage=1)


def _groups(parallel: ParallelConfig) -> ParallelGroups:
    return start_groups(ParallelLayout.from_config(parallel, dist.get_world_size()))


def _examine(parallel: ParallelConfig) -> tuple[list[Fault], list[str], set[tuple[str, str, int]]]:
    groups, device = _groups(parallel), use_device(dist.get_rank())
    faults = check_results(groups, device)
    timed = time_collectives(groups, device)
    assert all(0 < one.seconds <= one.slowest and one.bandwidth > 0 for one in timed)
    return faults, list(axes(groups)), {(t.axis, t.operation, t.groups) for t in timed}


@pytest.mark.parametrize(
    ("parallel", "names", "groups"),
    [
        (MIXED, ["world", "tensor", "pipe"], {"world": 1, "tensor": 2, "pipe": 2}),
        (WIDE, ["world", "data", "expert", "expert_data"], None),
    ],
)
def test_all_groups_of_a_layout_are_tried_and_timed(
    ranks: Ranks, parallel: ParallelConfig, names: list[str], groups: dict[str, int] | None
) -> None:
    first, *others = ranks(4).run(_examine, parallel)
    faults, found, timed = first
    assert faults == [] and found == names
    assert all(other == ([], names, set()) for other in others)
    assert {(axis, op) for axis, op, _ in timed if axis != "stages"} == {
        (axis, op) for axis in names for op in OPERATIONS
    }
    if groups is not None:
        assert {axis: n for axis, _, n in timed if axis != "stages"} == groups
        assert {(axis, op) for axis, op, _ in timed} >= {("stages", "send")}


def _one_rank_is_broken(rank: int) -> dict[str, list[str]]:
    """Of the groups of `MIXED`, what is found if an operation's results are wrong on one rank."""
    groups, device = _groups(MIXED), use_device(dist.get_rank())
    found = {}
    for operation in BROKEN:
        right: Callable[..., object] = getattr(dist, operation)

        def wrong(
            result: Tensor, *args: object, right: Callable[..., object] = right, **kwargs: object
        ) -> None:
            right(result, *args, **kwargs)
            result[-1] += 1

        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(dist, operation, wrong)
            found[operation] = [fault.problem for fault in check_results(groups, device)]
    return found


def test_a_wrong_result_names_the_collective_and_the_group(ranks: Ranks) -> None:
    found = ranks(4).run(_one_rank_is_broken, 2)
    assert found[0] == found[1] == found[3] == {operation: [] for operation in BROKEN}
    members = {"world": "ranks 0-3", "tensor": "ranks 2-3", "pipe": "ranks 0, 2"}
    for operation, name in BROKEN.items():
        groups = members if name != "send" else {"pipe": members["pipe"]}
        assert found[2][operation] == [
            f"{name} over the {axis} group of {ranks_of} gives wrong results"
            for axis, ranks_of in groups.items()
        ]

"""DeepSpeed finds the ranks of every axis where megatron-core put them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import Ranks
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout

LAYOUTS = [
    ParallelLayout(4, 2, 2, 2, sequence_parallel=True, zero_stage=1),
    ParallelLayout(4, 1, 1, 2, sequence_parallel=False, zero_stage=1),
    ParallelLayout(8, 2, 2, 4, sequence_parallel=True, zero_stage=1),
]


def _places(layout: ParallelLayout) -> dict[str, Any]:
    # DeepSpeed picks its accelerator when it is imported.
    import deepspeed
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid
    from deepspeed.utils import groups as found

    from uoe_parallel.parallel.deepspeed_groups import WideExpertGroups, topology

    groups = start_groups(layout)
    ours = {
        name: dist.get_process_group_ranks(getattr(groups, name))
        for name in ("tensor", "data", "pipe", "expert", "expert_data")
    }
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    grid: Any = PipelineParallelGrid(topology=topology(layout), process_group=dist.group.WORLD)
    theirs = {
        "tensor": dist.get_process_group_ranks(grid.get_slice_parallel_group()),
        "data": dist.get_process_group_ranks(grid.get_data_parallel_group()),
        "pipe": dist.get_process_group_ranks(grid.get_pipe_parallel_group()),
    }
    if layout.has_wide_experts:
        marker = WideExpertGroups(groups)
        marker.set_deepspeed_parallelism(False)
        name = f"ep_size_{layout.expert}"
        assert found._get_expert_parallel_world_size(name) == layout.expert
        assert found._get_expert_data_parallel_world_size(name) == layout.expert_data
        source = found._get_expert_broadcast_src_rank(name)
        assert source == dist.get_process_group_ranks(groups.expert_data)[0]
        assert list(marker.parameters()) == []
    return {"ours": ours, "theirs": theirs, "stage": groups.stage}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_agree(ranks: Ranks, layout: ParallelLayout) -> None:
    everybody = range(layout.world_size)
    places = [layout.coordinates(rank) for rank in everybody]
    for rank, found in enumerate(ranks(layout.world_size).run(_places, layout)):
        me = places[rank]
        same_stage = [r for r in everybody if places[r].pipe == me.pipe]
        expected = {
            "tensor": [r for r in same_stage if places[r].data == me.data],
            "data": [r for r in same_stage if places[r].tensor == me.tensor],
            "pipe": [
                r for r in everybody if (places[r].tensor, places[r].data) == (me.tensor, me.data)
            ],
            "expert": [r for r in same_stage if places[r].expert_data == me.expert_data],
            "expert_data": [r for r in same_stage if places[r].expert == me.expert],
        }
        assert found["ours"] == expected
        assert found["theirs"] == {name: expected[name] for name in found["theirs"]}
        assert found["stage"] == me.pipe

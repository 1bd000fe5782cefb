"""Our groups as DeepSpeed knows them: an mpu, a topology of stages, and groups of experts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import groups as deepspeed_groups
from torch import nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.sharding import wide_group_name


class ModelParallelUnit:
    """What `deepspeed.initialize(mpu=...)` reads.

    DeepSpeed uses two families of names for the same groups and needs both. The names of
    sequence groups are left out on purpose: it reads those as Ulysses, which shards differently.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._tensor = groups.tensor
        self._data = groups.data

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._tensor)[0]

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()


def topology(layout: ParallelLayout) -> PipeModelDataParallelTopology:
    """The grid of DeepSpeed's pipeline, whose order of ranks is `ParallelLayout`'s."""
    return PipeModelDataParallelTopology(
        num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
    )


class WideExpertGroups(MoE):
    """Tells DeepSpeed of the expert groups: it has no parameters and computes nothing.

    DeepSpeed looks for modules of its own MoE class to learn that there are parameters which only
    some data-parallel ranks share, and lets these modules make the groups. Ours are
    megatron-core's.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        nn.Module.__init__(self)
        self.num_experts = groups.expert.size()
        self._groups = groups

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Called by `deepspeed.initialize`."""
        name = wide_group_name(self._groups.expert.size())
        for kind, group in (
            ("EXPERT_PARALLEL", self._groups.expert),
            ("EXPERT_DATA_PARALLEL", self._groups.expert_data),
        ):
            # Private names; tests/parallel/test_deepspeed_groups.py notices when they move.
            getattr(deepspeed_groups, f"_{kind}_GROUP")[name] = group
            ranks = dist.get_process_group_ranks(group)
            getattr(deepspeed_groups, f"_{kind}_GROUP_RANKS")[name] = ranks

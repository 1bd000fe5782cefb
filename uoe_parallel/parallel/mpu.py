"""The face of our groups that DeepSpeed asks for."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from uoe_parallel.parallel.groups import ParallelGroups


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

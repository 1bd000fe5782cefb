"""Process groups: started by megatron-core, handed on as one explicit bundle."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from uoe_parallel.parallel.device import Device, use_device
from uoe_parallel.parallel.environment import variables
from uoe_parallel.parallel.layout import ParallelLayout

TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other before the backend gives up."""


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's process groups and its place in each."""

    layout: ParallelLayout
    rank: int
    world: ProcessGroup
    tensor: ProcessGroup
    data: ProcessGroup
    pipe: ProcessGroup
    expert: ProcessGroup
    """The ranks that share the experts of wide blocks; the tensor group itself if none are."""
    expert_data: ProcessGroup
    """The ranks that hold the same experts of wide blocks."""

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.pipe.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipe.size() - 1

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Ranks of this launch, as torchrun, the deepspeed launcher or mpirun states them."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)


def rank_from_environment() -> int:
    """This process's rank before any process group exists."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


def local_size_from_environment() -> int:
    """Ranks of this launch on this node, as torchrun, the deepspeed launcher or mpirun states
    them; all of them where the launcher does not say."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    told = (os.environ[name] for name in names if os.environ.get(name))
    return int(next(told, world_size_from_environment()))


@contextmanager
def distributed(timeout: timedelta = TIMEOUT) -> Iterator[Device]:
    """torch.distributed and deepspeed.comm for the life of the block.

    The ranks come from torchrun's variables, or through mpi4py under mpirun; a process that no
    launcher started becomes the only rank.
    """
    launched_by_mpi = "RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" in os.environ
    alone: dict[str, str] = {}
    if "RANK" not in os.environ and not launched_by_mpi:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(_free_port())
    with variables(alone):
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
        device = use_device(int(local_rank or 0))

        import deepspeed

        deepspeed.init_distributed(
            dist_backend=device.backend,
            auto_mpi_discovery=launched_by_mpi,
            distributed_port=int(os.environ.get("MASTER_PORT", "29500")),  # read under mpirun only
            verbose=False,
            timeout=timeout,
            dist_init_required=None,
        )
        try:
            yield device
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_groups(layout: ParallelLayout, timeout: timedelta = TIMEOUT) -> ParallelGroups:
    """Create megatron-core's groups for `layout`. Collective over all ranks. `timeout`: how long
    ranks wait for each other in them."""
    assert dist.get_world_size() == layout.world_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        # Which may be a fraction; its own default is three times what all ranks together have.
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # pyright: ignore[reportArgumentType]
    )
    tensor = _started(parallel_state.get_tensor_model_parallel_group())
    data = _started(parallel_state.get_data_parallel_group())
    wide = layout.has_wide_experts
    return ParallelGroups(
        layout=layout,
        rank=dist.get_rank(),
        world=_started(dist.group.WORLD),
        tensor=tensor,
        data=data,
        pipe=_started(parallel_state.get_pipeline_model_parallel_group()),
        expert=_started(parallel_state.get_expert_model_parallel_group()) if wide else tensor,
        expert_data=_started(parallel_state.get_expert_data_parallel_group()) if wide else data,
    )


def start_aside_group() -> ProcessGroup:
    """All ranks once more, on the CPU: what two threads call on one group would meet in another
    order on each rank. Collective over all ranks."""
    return _started(dist.new_group(backend="gloo", timeout=TIMEOUT))


def _started(group: object) -> ProcessGroup:
    assert isinstance(group, ProcessGroup)
    return group

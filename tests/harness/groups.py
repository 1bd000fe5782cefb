"""Back to the state before any process group was made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import copy
from types import ModuleType
from typing import Any

import deepspeed.comm.comm
import deepspeed.runtime.sequence_parallel.parallel_state_sp
import deepspeed.utils.groups
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from megatron.core import parallel_state


def _globals(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not (name.startswith("__") or callable(value) or isinstance(value, ModuleType)):
            yield name, value


# Both libraries keep groups in private module globals, and their own clean-up forgets some
# (megatron-core: lists of ranks and one data-parallel group; DeepSpeed: its backend). What was
# there when this module was imported, before any group, is complete by construction.
_PRISTINE = {
    module: {name: copy(value) for name, value in _globals(module)}
    for module in (
        parallel_state,
        deepspeed.comm.comm,
        deepspeed.utils.groups,
        deepspeed.runtime.sequence_parallel.parallel_state_sp,
    )
}


def reset_groups() -> None:
    """Destroy every process group of this rank, the world included, and forget them all.

    Local: call it when no peer waits in a collective any more.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    for module, pristine in _PRISTINE.items():
        for name in [name for name, _ in _globals(module) if name not in pristine]:
            delattr(module, name)
        for name, value in pristine.items():
            setattr(module, name, copy(value))
    # ZeRO 3 numbers parameters and modules over a process's life and wants the numbers equal on
    # all ranks, but ranks have not all run the same cases. The second count is a default argument.
    Init.param_id = 0
    (module_count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ([0],)
    module_count[0] = 0
    deepspeed.checkpointing.get_cuda_rng_tracker().reset()
    # Engines are reference cycles that hold groups, and groups hold threads and sockets.
    gc.collect()

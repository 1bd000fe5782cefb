"""The module that decides whether this run is on CPU or on CUDA.

Megatron-Core asks `torch.cuda.current_device()` where to put its buffers, also on machines
without a GPU. `use_device` answers that question for the CPU, so that the code that the CPU
tests run is the code that GPUs run.
"""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass
from typing import Any

import torch

from uoe_parallel.config.schema import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}

_TRIM_THRESHOLD, _NUM_MMAPPED_BLOCKS = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h


@dataclass(frozen=True)
class Device:
    """What this process computes on."""

    torch_device: torch.device
    backend: str
    """Backend of torch.distributed: gloo, and on CUDA nccl for the device's tensors."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for queued work, so that wall-clock times mean something."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def peak_memory(self) -> int:
        """Most bytes this process has held: of the device on CUDA, resident on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_device(local_rank: int) -> Device:
    """Make `cuda:<local_rank>`, or the CPU where there is no GPU, this process's device.

    Must run before `import deepspeed`, which picks its accelerator from the environment then.
    """
    # Megatron's overlap of communication with products relies on one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        # Control messages and checkpoints' small talk go over CPU tensors.
        return Device(torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl")
    os.environ["DS_ACCELERATOR"] = "cpu"
    _answer_for_cuda()
    _skip_shared_memory_op()
    _keep_freed_memory()
    return Device(torch.device("cpu"), "gloo")


def _keep_freed_memory() -> None:
    # glibc hands large blocks back to the system when they are freed, and takes each page with a
    # fault when the next activation of the same size comes: of a step on a CPU this is a large
    # part. CUDA has torch's caching allocator.
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # of GNU's C library
        allocator.mallopt(_NUM_MMAPPED_BLOCKS, 0)
        allocator.mallopt(_TRIM_THRESHOLD, -1)


def _answer_for_cuda() -> None:
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]


def _skip_shared_memory_op() -> None:
    # DeepSpeed would compile a C++ all-reduce for inference at its first start on a CPU: minutes
    # and a compiler for something that training never calls, and a lock left by a killed build
    # hangs every later run. Asking it for its list would run the compiler too, in every rank.
    import deepspeed.ops

    ops: dict[str, Any] = deepspeed.ops.__dict__
    ops.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False

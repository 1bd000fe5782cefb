"""Bytes of tensors: the most that live at a time, and those kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from uoe_parallel.parallel.device import Device


def peak_memory(run: Callable[[], object], device: Device) -> int:
    """The most bytes that live at a time while `run` runs, beyond those that lived before it.

    `run` must not free what lived before, whose bytes would make up for its own. On CUDA bytes are
    those of torch's allocator, which rounds them up; on CPU each request is counted as it is, with
    the few bytes of the numbers that torch wraps as tensors and the kernels' own buffers, but not
    what libraries such as MKL allocate for themselves.
    """
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(device.torch_device)
        before = torch.cuda.memory_allocated(device.torch_device)
        run()
        return torch.cuda.max_memory_allocated(device.torch_device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    # torch declares no `nbytes` in its stubs.
    changes = [
        (e.start_ns(), e.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for e in events
        if e.name() == "[memory]"
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """A list that gets every tensor that autograd keeps of the forward pass in the block, but for
    those that hooks of the layer's own pack away."""
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield kept


def storage_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Of the distinct storages of `tensors` that are none of those of `besides`."""
    others = {x.untyped_storage().data_ptr() for x in besides}
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for address, size in sizes.items() if address not in others)

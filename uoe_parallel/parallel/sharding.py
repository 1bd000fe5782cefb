"""Which part of a full weight a parameter is: read off megatron-core's own attributes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose


@dataclass(frozen=True)
class Shard:
    """A rank's part of a full tensor: the box `offsets` .. `offsets + shape` of `global_shape`."""

    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """Selects this part out of the full tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))


@dataclass(frozen=True)
class Box:
    """A part of a tensor, as wide as `shape` from the index `offsets` on."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, size: int) -> Iterator[tuple[Box, int]]:
    """What `size` elements of a flattened tensor of `shape`, from `start` on, are in that tensor:
    boxes, and where in the `size` elements each begins. Of a matrix at most three: the end of a
    row, whole rows, the beginning of one.
    """
    if size == 0:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row, end = math.prod(shape[1:]), start + size
    index = start
    while index < end:
        number, column = divmod(index, row)
        rows = (end - index) // row if column == 0 else 0
        if rows > 0:
            box = Box((number, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            yield box, index - start
            index += rows * row
            continue
        length = min(row - column, end - index)
        for inner, at in boxes(shape[1:], column, length):
            yield Box((number, *inner.offsets), (1, *inner.shape)), index - start + at
        index += length


def partition_dim(param: Tensor) -> int | None:
    """The dimension that megatron-core cut over the tensor group, None if it is whole."""
    if not getattr(param, "tensor_model_parallel", False):
        return None
    return getattr(param, "partition_dim")  # noqa: B009 - set by megatron-core on the tensor


def mark_wide(param: Tensor, group: ProcessGroup) -> None:
    """Say that `param` is cut over an expert group that reaches over data-parallel ranks.

    In DeepSpeed's own marks: it then averages the gradient over the ranks that hold the same
    experts, which it finds by the group's name.
    """
    param.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    param.group_name = wide_group_name(group.size())  # pyright: ignore[reportAttributeAccessIssue]


def wide_group_name(size: int) -> str:
    """DeepSpeed's name of expert groups of `size` ranks."""
    return f"ep_size_{size}"


def is_wide(param: Tensor) -> bool:
    return not getattr(param, "allreduce", True)


def cut_group(param: Tensor, groups: ParallelGroups) -> ProcessGroup:
    """The ranks that `param` is cut over, or would be if it were cut."""
    return groups.expert if is_wide(param) else groups.tensor


def replica_group(param: Tensor, groups: ParallelGroups) -> ProcessGroup:
    """The ranks that hold the same part of `param` for other tokens."""
    return groups.expert_data if is_wide(param) else groups.data


def counts_once(param: Tensor, groups: ParallelGroups) -> bool:
    """False for what another rank of the same replica of the model holds as well: whole parameters
    on all tensor ranks but the first, and the copy of a tied weight on the last stage."""
    if getattr(param, "ds_pipe_replicated", False):  # DeepSpeed's mark of such a copy
        return False
    return partition_dim(param) is not None or groups.tensor_rank == 0


def is_owner(param: Tensor, groups: ParallelGroups) -> bool:
    """Whether of all ranks that hold this part of `param` this is the one that counts."""
    return counts_once(param, groups) and replica_group(param, groups).rank() == 0


def parameter_shape(param: Tensor) -> tuple[int, ...]:
    """The local shape, also while ZeRO 3 has taken the data away."""
    return tuple(getattr(param, "ds_shape", param.shape))


def shard_of(param: Tensor, group: ProcessGroup) -> Shard:
    """Where `param` lies in its full weight, cut over `group`."""
    shape, dim = parameter_shape(param), partition_dim(param)
    if dim is None:
        return Shard(shape, shape, (0,) * len(shape))
    full = tuple(n * group.size() if d == dim else n for d, n in enumerate(shape))
    offsets = tuple(n * group.rank() if d == dim else 0 for d, n in enumerate(shape))
    return Shard(shape, full, offsets)


def gather_full(param: Tensor, group: ProcessGroup, value: Tensor | None = None) -> Tensor:
    """The full weight of `param`, or the full tensor of a `value` shaped like it (its gradient).

    Collective over `group`, which it is cut over.
    """
    local = param.detach() if value is None else value.detach()
    dim = partition_dim(param)
    return local.clone() if dim is None else comm.gather_shards(local, dim, group, Purpose.REPORT)


@torch.no_grad()
def load_full(param: Tensor, full: Tensor, group: ProcessGroup) -> None:
    """Copy this rank's part of `full` into `param`."""
    shard = shard_of(param, group)
    assert tuple(full.shape) == shard.global_shape, (tuple(full.shape), shard.global_shape)
    param.copy_(full[shard.index])


def named_shards(
    model: nn.Module, groups: ParallelGroups
) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Every parameter once (a tied one under its first name) with its place."""
    for name, param in model.named_parameters():
        yield name, param, shard_of(param, cut_group(param, groups))

"""Which part of a full weight a parameter is: read off megatron-core's own attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm


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


def partition_dim(param: Tensor) -> int | None:
    """The dimension that megatron-core cut over the tensor group, None if it is whole."""
    if not getattr(param, "tensor_model_parallel", False):
        return None
    return getattr(param, "partition_dim")  # noqa: B009 - set by megatron-core on the tensor


def parameter_shape(param: Tensor) -> tuple[int, ...]:
    """The local shape, also while ZeRO 3 has taken the data away."""
    return tuple(getattr(param, "ds_shape", param.shape))


def shard_of(param: Tensor, group: ProcessGroup) -> Shard:
    """Where `param` lies in its full weight, cut over the tensor group `group`."""
    shape, dim = parameter_shape(param), partition_dim(param)
    if dim is None:
        return Shard(shape, shape, (0,) * len(shape))
    full = tuple(n * group.size() if d == dim else n for d, n in enumerate(shape))
    offsets = tuple(n * group.rank() if d == dim else 0 for d, n in enumerate(shape))
    return Shard(shape, full, offsets)


def gather_full(param: Tensor, group: ProcessGroup, value: Tensor | None = None) -> Tensor:
    """The full weight of `param`, or the full tensor of a `value` shaped like it (its gradient).

    Collective over the tensor group.
    """
    local = param.detach() if value is None else value.detach()
    dim = partition_dim(param)
    return local.clone() if dim is None else comm.gather_shards(local, dim, group)


@torch.no_grad()
def load_full(param: Tensor, full: Tensor, group: ProcessGroup) -> None:
    """Copy this rank's part of `full` into `param`."""
    shard = shard_of(param, group)
    assert tuple(full.shape) == shard.global_shape, (tuple(full.shape), shard.global_shape)
    param.copy_(full[shard.index])


def named_shards(
    model: nn.Module, group: ProcessGroup
) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Every parameter once (a tied one under its first name) with its place."""
    for name, param in model.named_parameters():
        yield name, param, shard_of(param, group)

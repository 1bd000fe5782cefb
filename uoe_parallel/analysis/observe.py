"""Counts what a rank's collectives carry while code runs: one installable wrapper around all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATIONS = {
    "allreduce_": ("all_reduce", "tensors"),
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_": ("all_gather", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
    "barrier": ("barrier", None),
}
"""By the name of torch's operator: the operation, and the argument with what a rank puts in."""

_ONE_WAY = ("recv_", "recv_any_source_")
"""The other end of a send, which puts nothing in."""


@dataclass(frozen=True)
class Call:
    """What this rank put into one call."""

    payload: int
    """Bytes, as `Transfer.payload` counts them."""
    kept: int
    """Bytes, as `Transfer.kept` counts them."""
    dtype: torch.dtype | None
    """Of the numbers; None if nothing was put in."""
    row_shape: torch.Size
    """Of what lies along the first dimension of the (first) tensor."""


@dataclass(frozen=True)
class Observed:
    """What this rank did in all calls of one operation on one group."""

    calls: int
    payload: int
    """Bytes, as `Transfer.payload` counts them."""
    kept: int
    """Bytes, as `Transfer.kept` counts them."""


class CollectiveObserver(TorchDispatchMode):
    """A context in which every collective of this process is counted, whoever calls it.

    It looks below `torch.distributed`'s functions, of which the libraries keep copies, at the
    operators that all of them end in, backward passes included: megatron-core's, DeepSpeed's and
    our own are all seen, and each once. Groups of one rank move nothing and are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, tuple[int, ...]], list[Call]] = defaultdict(list)
        """By (operation, ranks), in order; the ranks of a send are its two ends, in order of
        rank."""

    @property
    def seen(self) -> dict[tuple[str, tuple[int, ...]], Observed]:
        """The sums of `calls`."""
        return {
            key: Observed(len(calls), sum(c.payload for c in calls), sum(c.kept for c in calls))
            for key, calls in self.calls.items()
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._opname
        if name in _ONE_WAY:
            return
        # An operator that is not in the list must not be left out in silence.
        operation, argument = _OPERATIONS[name]
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=False))
        group = ProcessGroup.unbox(given["process_group"])
        ranks = tuple(dist.get_process_group_ranks(group))
        put_in = None if argument is None else _first(given[argument])
        payload = 0 if argument is None else _bytes(given[argument])
        kept = _kept(given, group) if operation == "all_to_all" else 0
        if operation == "broadcast" and given["root_rank"] != group.rank():
            payload = 0
        if operation == "send":
            ranks = tuple(sorted((dist.get_rank(), ranks[given["dst"]])))
        if len(ranks) > 1:
            dtype = None if put_in is None else put_in.dtype
            row_shape = torch.Size() if put_in is None else put_in.shape[1:]
            self.calls[operation, ranks].append(Call(payload, kept, dtype, row_shape))


def _bytes(tensors: Tensor | list[Any]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _first(tensors: Tensor | list[Any]) -> Tensor | None:
    if isinstance(tensors, Tensor):
        return tensors
    return _first(tensors[0]) if tensors else None


def _kept(given: dict[str, Any], group: ProcessGroup) -> int:
    """Bytes that an all-to-all sends to its own rank."""
    rows, splits = given["input"], given["input_split_sizes"]
    if rows.numel() == 0:
        return 0
    own = splits[group.rank()] if splits else rows.shape[0] // group.size()
    return own * _bytes(rows[0])

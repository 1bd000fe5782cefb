"""Looks on at a rank's collectives while code runs: one wrapper around all, whoever calls them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.naming import Naming
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Phase, Purpose, is_aside

OPERATIONS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "send": ("send", 0),
    "recv": ("recv", None),
    "barrier": ("barrier", None),
}
"""By the method's name: the operation, and the argument with what a rank puts in."""

_MOVERS = (
    "all",
    "reduce",
    "broadcast",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
    "monitored",
)
"""How the names of methods that move data begin."""


@dataclass(slots=True)
class Call:
    """What this rank put into one call, and why."""

    operation: str
    """As `Transfer.operation`, or another name of `OPERATIONS`."""
    group: ProcessGroup
    ranks: tuple[int, ...]
    """Of the group; of a send or "recv", its two ends, in order of rank."""
    purpose: Purpose
    phase: Phase
    payload: int
    """Bytes, as `Transfer.payload` counts them."""
    kept: int
    """Bytes, as `Transfer.kept` counts them."""
    is_async: bool
    """Whether the caller goes on at once. A send or a "recv" does not tell, and is taken not to."""
    way: tuple[int, ...] | str
    """The ranks, but of a send or "recv" from whom and to whom, and of what goes on aside that as
    well: both ends, and all ranks of a group, call what goes one way in the same order."""


@dataclass(frozen=True)
class Observed:
    """What this rank did in all calls of one operation on one group."""

    calls: int
    payload: int
    """Bytes, as `Transfer.payload` counts them."""
    kept: int
    """Bytes, as `Transfer.kept` counts them."""

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Observed:
        """Their sum."""
        return cls(len(calls), sum(c.payload for c in calls), sum(c.kept for c in calls))


class Interception:
    """A context in which every collective of this process is seen, whoever calls it.

    It replaces the methods of `ProcessGroup`, below `torch.distributed`'s functions, of which the
    libraries keep copies: megatron-core's, DeepSpeed's and our own calls are all seen, and each
    once, those of backward passes included. Nothing is replaced while no such context is open; of
    several, the one that was opened last is to be closed first. Groups of one rank move nothing and
    are left out, and so is what goes on `aside`, if not asked for.
    """

    refuses_unknown = False
    """Whether a collective that is not in `OPERATIONS` raises KeyError. It is left alone if not: no
    run is to end by being looked at."""

    sees_aside = False
    """Whether what goes on `aside` is seen as well, from its own thread."""

    def __init__(self, groups: ParallelGroups | None = None) -> None:
        """Without `groups` the libraries' calls have no purpose: `Purpose.OTHER`."""
        self.naming = Naming(groups)
        self._replaced = ExitStack()
        self._waited_for: dict[int, tuple[Any, Any]] = {}
        """By the id of a work that goes on: the work, which keeps the id its own, and its note."""

    def called(self, call: Call) -> Any:
        """Before a collective starts. What it returns is the note that the others are given, None
        if they need not be called."""

    def launched(self, note: Any, work: Any) -> None:
        """After a collective has started, as `work`."""

    def waits(self, note: Any) -> None:
        """Before the caller waits for a collective's end."""

    def waited(self, note: Any) -> None:
        """When the caller goes on."""

    def __enter__(self) -> Self:
        for name in list(vars(ProcessGroup)):
            if name in OPERATIONS:
                self._replace(ProcessGroup, name, self._collective(name))
            elif self.refuses_unknown and name.removeprefix("_").startswith(_MOVERS):
                self._replace(ProcessGroup, name, _refused(name))
        self._replace(dist.Work, "wait", self._wait())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._replaced.close()
        self._waited_for.clear()

    def _replace(self, owner: type, name: str, function: Callable[..., Any]) -> None:
        # As it lies in the class: what `getattr` makes of it would no longer bind to instances.
        self._replaced.callback(setattr, owner, name, vars(owner)[name])
        setattr(owner, name, function)

    def _collective(self, name: str) -> Callable[..., Any]:
        original = getattr(ProcessGroup, name)
        operation, place = OPERATIONS[name]

        def method(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1 or (is_aside() and not self.sees_aside):
                return original(group, *args, **kwargs)
            payload = 0 if place is None else _bytes(args[place])
            note = self.called(self._call(operation, group, payload, args, kwargs))
            work = original(group, *args, **kwargs)
            if note is not None:
                self.launched(note, work)
                self._waited_for[id(work)] = (work, note)
            return work

        return method

    def _wait(self) -> Callable[..., Any]:
        original: Any = dist.Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            found = self._waited_for.pop(id(work), None)
            if found is None:
                return original(work, *args, **kwargs)
            self.waits(found[1])
            result = original(work, *args, **kwargs)
            self.waited(found[1])
            return result

        return wait

    def _call(
        self,
        operation: str,
        group: ProcessGroup,
        payload: int,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Call:
        naming, kept = self.naming, 0
        ranks = naming.ranks(group)
        way: tuple[int, ...] | str = ranks
        if operation in ("send", "recv"):
            is_async = False
            own, other = dist.get_rank(), ranks[args[1]]
            ranks = (min(own, other), max(own, other))
            way = f"{own} to {other}" if operation == "send" else f"{other} to {own}"
        else:
            options = kwargs["opts"] if "opts" in kwargs else args[-1]
            # Some coalesced calls have no options.
            is_async = getattr(options, "asyncOp", False)
            if operation == "all_to_all":
                kept = _kept(args[1], args[3], group)
            elif operation == "broadcast" and options.rootRank != group.rank():
                payload = 0
        if is_aside():
            way = f"aside of {way}"
        purpose = naming.purpose(operation, group, ranks, payload)
        phase = naming.phase(purpose)
        return Call(operation, group, ranks, purpose, phase, payload, kept, is_async, way)


class CollectiveObserver(Interception):
    """Counts what this rank puts into its collectives while the context is open."""

    refuses_unknown = True

    def __init__(self, groups: ParallelGroups | None = None) -> None:
        super().__init__(groups)
        self.calls: dict[tuple[str, tuple[int, ...]], list[Call]] = defaultdict(list)
        """By (operation, ranks), in order; without the other end of a send, which puts nothing
        in."""

    @property
    def seen(self) -> dict[tuple[str, tuple[int, ...]], Observed]:
        """The sums of `calls`."""
        return {key: Observed.of(calls) for key, calls in self.calls.items()}

    def called(self, call: Call) -> None:
        if call.operation != "recv":
            self.calls[call.operation, call.ranks].append(call)


def _refused(name: str) -> Callable[..., Any]:
    """A collective that is not in the list must not be left out in silence."""

    def method(*_: Any, **__: Any) -> Any:
        raise KeyError(name)

    return method


def _bytes(tensors: Tensor | Sequence[Any]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_bytes, tensors))


def _kept(rows: Tensor, splits: Sequence[int], group: ProcessGroup) -> int:
    """Bytes that an all-to-all sends to its own rank."""
    if not splits:
        return rows.nbytes // group.size()
    total = rows.shape[0]
    return rows.nbytes // total * splits[group.rank()] if total else 0

"""What is known of one collective of one rank."""

from __future__ import annotations

from typing import NamedTuple

from uoe_parallel.parallel.purposes import Phase, Purpose


class Event(NamedTuple):
    """One call of a collective on a group of two ranks or more.

    Times are seconds of this process's `time.perf_counter`. The caller was blocked from `waited`
    to `finished`, and the transfer was under way, or waited for the last rank, from `started` to
    `ended`: what lies between `started` and `waited` was hidden behind the caller's own work. Of a
    blocking call `waited` is `started` and `ended` is `finished`. One that was over when the caller
    came to wait for it ended then, as far as is known, or before.
    """

    operation: str
    """As `analysis.transfer.Operation`, or another that only bookkeeping uses, such as "barrier";
    "recv" is the other end of a "send"."""
    ranks: tuple[int, ...]
    """Of the group, in its order; of a send, its two ends in order of rank."""
    axis: str
    """The group's name in `analysis.transfer.group_ranks`; "other" for one that has none. A
    library's own group bears the name of one of ours of the same ranks: `Transfer`s are compared
    by ranks."""
    purpose: Purpose
    """As `Transfer.purpose`; its `category` groups purposes."""
    phase: Phase
    step: int
    """The training step, from 0; -1 before the first one."""
    number: int
    """Which call of these ranks this was since recording began, on whichever of the groups that
    they share: the same on all of them, so (ranks, number) is one collective. Sends and their other
    ends are counted by direction, which `purpose` tells: (ranks, purpose, number) is one."""
    payload: int
    """Bytes, as `Transfer.payload` counts them."""
    kept: int
    """Bytes, as `Transfer.kept` counts them."""
    started: float
    """When it was called."""
    waited: float
    """When the caller began to wait for its end."""
    finished: float
    """When the caller went on after it."""
    ended: float
    """When the transfer was over, which an asynchronous one may be before `waited`."""
    is_async: bool
    """Whether the caller could do other work meanwhile."""

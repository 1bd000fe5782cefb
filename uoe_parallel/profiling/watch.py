"""Ends a run whose ranks wait for one that does not come, and says which one."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from uoe_parallel.analysis.observe import Call, Interception
from uoe_parallel.errors import HANG_EXIT_CODE
from uoe_parallel.parallel.groups import ParallelGroups

_VERDICT = "verdict"
_LOOKS = 3
"""Ticks between a first and a second look at who is missing."""
_States = Mapping[int, dict[str, Any]]
"""By rank, what it told of itself last."""


@dataclass(slots=True)
class _Wait:
    """A collective, and since when its caller waits for its end."""

    call: Call
    number: int
    """Which one of its ranks, or of its direction, it is."""
    since: float = 0.0
    """Seconds of `time.monotonic`."""
    passed: Any = None
    """A mark after it, where it is a stream that waits for it and not its caller."""

    def __str__(self) -> str:
        call, ranks = self.call, ", ".join(map(str, self.call.ranks))
        return f"{call.operation} for {call.purpose} ({call.phase}) over ranks {ranks}"


class Watch(Interception):
    """A context in which no collective waits for longer than `limit` seconds.

    Every rank opens it at the same place. A thread of each tells the others through the default
    store how far its rank has come. When a collective waits beyond the limit, the first rank to
    find out says so on stderr, with the ranks that have not arrived, and all ranks end with
    `HANG_EXIT_CODE`: also one that hangs in Python. One that is stopped, or hangs in code that
    holds Python's lock, is left to the launcher, which ends it when the others have gone.
    """

    def __init__(self, groups: ParallelGroups, limit: float) -> None:
        super().__init__(groups)
        self._rank, self._world = groups.rank, groups.layout.world_size
        self._limit = limit
        self._tick = min(limit / 8, 1.0)
        """Seconds between two looks."""
        self._has_streams = torch.cuda.is_available()
        self._reached: dict[tuple[int, ...] | str, int] = defaultdict(int)
        self._waiting: _Wait | None = None
        """What the caller stands still for."""
        self._queued: deque[_Wait] = deque()
        """What the caller has gone on from, and its stream not yet, in the stream's order."""
        self._queue_lock = threading.Lock()
        self._place = "before the first step"
        self._closed, self._ending = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._look, self._give_up)
        ]

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """As `StepObserver`."""
        self._place = f"in step {number}"
        yield
        self._place = f"after step {number}"

    def called(self, call: Call) -> _Wait:
        self._reached[call.way] += 1
        return _Wait(call, self._reached[call.way])

    def waits(self, note: _Wait) -> None:
        note.since = time.monotonic()
        self._waiting = note

    def waited(self, note: _Wait) -> None:
        self._waiting = None
        if self._has_streams:
            # Not the work itself, which holds its tensors.
            note.passed = torch.cuda.Event()
            note.passed.record()
            self._queued.append(note)

    def _current(self) -> _Wait | None:
        """What this rank waits for."""
        with self._queue_lock:
            while self._queued and self._queued[0].passed.query():
                self._queued.popleft()
                if self._queued:
                    self._queued[0].since = time.monotonic()
            return self._queued[0] if self._queued else self._waiting

    def __enter__(self) -> Self:
        super().__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RuntimeError):
            # A rank that the verdict has ended breaks others' connections: they are to end by it.
            self._ending.wait(3 * self._tick)
        if self._ending.is_set():
            self._threads[0].join()  # which ends the process
        self._closed.set()
        super().__exit__(kind, error, trace)

    def _look(self) -> None:
        default: Any = _get_default_store()  # its `clone` is not declared
        store = PrefixStore("uoe_parallel/watch", default.clone())
        suspected: tuple[_Wait, int, _States] | None = None
        for beat in itertools.count():
            if self._closed.wait(self._tick):
                return
            try:
                store.set(str(self._rank), json.dumps(self._state(beat)))
                if store.check([_VERDICT]):
                    self._end()
                if (late := self._late()) is None:
                    suspected = None
                elif suspected is None or suspected[0] is not late:
                    # Who has arrived just now will have told when it is looked at again.
                    suspected = (late, beat, self._states(store, late.call.ranks))
                elif beat - suspected[1] >= _LOOKS:
                    report = self._report(late, suspected[2], self._states(store, late.call.ranks))
                    if store.add("reporters", 1) == 1:
                        _say(report)
                        store.set(_VERDICT, str(self._rank))
                    self._end()
            except RuntimeError:  # the process that keeps the store has gone, or closes
                return

    def _give_up(self) -> None:
        """Where the store does not answer, whose process may be what is stopped or gone."""
        while not self._closed.wait(self._tick):
            late = self._late(grace=3 * _LOOKS * self._tick)
            if late is not None and not self._ending.is_set():
                _say(
                    f"rank {self._rank} {self._told(late)} Nobody can say who is missing: ranks "
                    "don't reach their store, whose process may be stopped or gone"
                )
                os._exit(HANG_EXIT_CODE)

    def _late(self, grace: float = 0.0) -> _Wait | None:
        """What waits beyond the limit, and `grace` seconds more."""
        wait = self._current()
        if wait is None or time.monotonic() - wait.since < self._limit + grace:
            return None
        return wait

    def _state(self, beat: int) -> dict[str, Any]:
        """How far this rank has come, and what it does."""
        waiting = self._current()
        doing = "is in code of its own" if waiting is None else f"waits itself in {waiting}"
        reached = {str(way): count for way, count in self._reached.copy().items()}
        return {"beat": beat, "reached": reached, "doing": doing}

    def _states(self, store: Store, ranks: tuple[int, ...]) -> _States:
        """What is known of those of `ranks` that have told."""
        told = (rank for rank in ranks if store.check([str(rank)]))
        return {rank: json.loads(store.get(str(rank))) for rank in told}

    def _report(self, late: _Wait, before: _States, now: _States) -> str:
        way = str(late.call.way)
        missing = []
        for rank in late.call.ranks:
            state = now.get(rank)
            is_silent = state is None or (rank in before and state["beat"] == before[rank]["beat"])
            if is_silent and rank != self._rank:
                missing.append(f"rank {rank}, which does not answer: stopped or gone")
            elif state is not None and state["reached"].get(way, 0) < late.number:
                missing.append(f"rank {rank}, which {state['doing']}")
        who = "; ".join(missing) or "nobody: all ranks called it, and the transfer does not end"
        return f"rank {self._rank} {self._told(late)} Not there: {who}"

    def _told(self, late: _Wait) -> str:
        axis = self.naming.axis(late.call.group, late.call.ranks)
        return (
            f"has waited longer than profile.wait_limit, {self._limit:g} s, in {late} of the "
            f"{axis} group, {self._place}."
        )

    def _end(self) -> None:
        self._ending.set()
        time.sleep(2 * self._tick)  # all ranks see the verdict before one leaves
        os._exit(HANG_EXIT_CODE)


def _say(report: str) -> None:
    print(f"uoe-pretrain: {report}", file=sys.stderr, flush=True)

"""Ends a run whose ranks wait for one that does not come, and says which one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from uoe_parallel.analysis.observe import Call, Interception
from uoe_parallel.errors import HANG_EXIT_CODE
from uoe_parallel.parallel.agreement import broadcast_json, gather_json
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import is_aside

_VERDICT = "verdict"
_LOOKS = 3
"""Ticks in which every rank tells of itself."""
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
    is_aside: bool = False
    """Whether its caller is the thread that writes a checkpoint."""

    def __str__(self) -> str:
        call, ranks = self.call, ", ".join(map(str, self.call.ranks))
        where = "beside training" if self.is_aside else call.phase
        return f"{call.operation} for {call.purpose} ({where}) over ranks {ranks}"


class Watch(Interception):
    """A context in which no collective waits for longer than `limit` seconds.

    Opening it is collective over all ranks. A thread of each tells the others through the default
    store how far its rank has come. When a collective waits beyond the limit, the first rank to
    find out says so on stderr, with the ranks that have not arrived, and all ranks end with
    `HANG_EXIT_CODE`: also one that hangs in Python. One that is stopped, or hangs in code that
    holds Python's lock, gets SIGKILL from those on its machine; alone there, it is left to the
    launcher, which ends it when the others have gone.

    Before the first step one rank may rightly read or build for long: those that answer are waited
    for, and the others count as missing once they have been silent for as long again.
    """

    sees_aside = True

    def __init__(self, groups: ParallelGroups, limit: float) -> None:
        super().__init__(groups)
        self._rank, self._world = groups.rank, groups.world
        self._limit = limit
        self._tick = min(limit / 8, 1.0)
        """Seconds between two looks."""
        self._has_streams = torch.cuda.is_available()
        self._reached: dict[tuple[int, ...] | str, int] = defaultdict(int)
        self._waiting: _Wait | None = None
        """What the caller stands still for."""
        self._waiting_aside: _Wait | None = None
        """The same of the thread that writes a checkpoint."""
        self._queued: deque[_Wait] = deque()
        """What the caller has gone on from, and its stream not yet, in the stream's order."""
        self._queue_lock = threading.Lock()
        self._has_begun = False
        """Whether a step has."""
        self._place = "before the first step"
        self._processes: list[dict[str, Any]] = []
        """Of each rank."""
        self._answered = time.monotonic()
        """When the store did last."""
        self._closed, self._ending = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._look, self._give_up)
        ]

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """As `StepObserver`."""
        self._has_begun = True
        self._place = f"in step {number}"
        yield
        self._place = f"after step {number}"

    def called(self, call: Call) -> _Wait:
        self._reached[call.way] += 1
        return _Wait(call, self._reached[call.way], is_aside=is_aside())

    def waits(self, note: _Wait) -> None:
        note.since = time.monotonic()
        if note.is_aside:
            self._waiting_aside = note
        else:
            self._waiting = note

    def waited(self, note: _Wait) -> None:
        if note.is_aside:
            self._waiting_aside = None
            return
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
        world = self._world
        self._processes = broadcast_json(gather_json(_this_process(), world), world)
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
                    self._end(json.loads(store.get(_VERDICT)))
                self._answered = time.monotonic()
                if (late := self._late()) is None:
                    suspected = None
                elif suspected is None or suspected[0] is not late:
                    # Who has arrived just now will have told when it is looked at again.
                    suspected = (late, beat, self._states(store, late.call.ranks))
                elif beat - suspected[1] >= self._looks():
                    now = self._states(store, late.call.ranks)
                    silent = self._silent(late, suspected[2], now)
                    if not silent and not self._has_begun:
                        suspected = None
                        continue
                    if store.add("reporters", 1) == 1:
                        _say(self._report(late, silent, now))
                        store.set(_VERDICT, json.dumps(silent))
                    self._end(silent)
            except RuntimeError:  # the process that keeps the store has gone, or closes
                return

    def _give_up(self) -> None:
        """Where the store does not answer, whose process may be what is stopped or gone."""
        grace = 3 * _LOOKS * self._tick
        while not self._closed.wait(self._tick):
            late = self._late(grace)
            if late is None or time.monotonic() - self._answered < grace or self._ending.is_set():
                continue
            stopped = [
                f"rank {rank} was stopped"
                for rank, process in enumerate(self._processes)
                if rank != self._rank and _kill(process, if_status=psutil.STATUS_STOPPED)
            ]
            why = ", ".join(stopped) or "its process may be stopped or gone"
            _say(
                f"rank {self._rank} {self._told(late)} Nobody can say who is missing: ranks don't "
                f"reach their store; {why}"
            )
            os._exit(HANG_EXIT_CODE)

    def _looks(self) -> int:
        """Ticks between a first and a second look at who is missing. What reads or builds may hold
        Python's lock for a while."""
        return _LOOKS if self._has_begun else max(_LOOKS, round(self._limit / self._tick))

    def _late(self, grace: float = 0.0) -> _Wait | None:
        """What waits beyond the limit, and `grace` seconds more."""
        since = time.monotonic() - self._limit - grace
        waits = (self._current(), self._waiting_aside)
        return next((wait for wait in waits if wait is not None and wait.since <= since), None)

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

    def _silent(self, late: _Wait, before: _States, now: _States) -> list[int]:
        """Those of the ranks of `late` that have not told of themselves since `before`."""

        def beat(states: _States, rank: int) -> int:
            return states[rank]["beat"] if rank in states else -1

        ranks = (rank for rank in late.call.ranks if rank != self._rank)
        return [rank for rank in ranks if beat(now, rank) <= beat(before, rank)]

    def _report(self, late: _Wait, silent: list[int], now: _States) -> str:
        way = str(late.call.way)
        missing = []
        for rank in late.call.ranks:
            if rank in silent:
                missing.append(f"rank {rank}, which does not answer: stopped or gone")
            elif now[rank]["reached"].get(way, 0) < late.number:
                doing = "still writes" if late.is_aside else now[rank]["doing"]
                missing.append(f"rank {rank}, which {doing}")
        who = "; ".join(missing) or "nobody: all ranks called it, and the transfer does not end"
        return f"rank {self._rank} {self._told(late)} Not there: {who}"

    def _told(self, late: _Wait) -> str:
        # What goes on aside has a group of its own, of all ranks.
        named = self.naming.axis(late.call.group, late.call.ranks)
        axis = "world" if late.is_aside else named
        return (
            f"has waited longer than profile.wait_limit, {self._limit:g} s, in {late} of the "
            f"{axis} group, {self._place}."
        )

    def _end(self, silent: list[int]) -> None:
        self._ending.set()
        for rank in silent:
            _kill(self._processes[rank])
        time.sleep(2 * self._tick)  # all ranks see the verdict before one leaves
        os._exit(HANG_EXIT_CODE)


def _say(report: str) -> None:
    print(f"uoe-pretrain: {report}", file=sys.stderr, flush=True)


def _this_process() -> dict[str, Any]:
    """As JSON, so that another one on the same machine finds it, and no other by its number."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    system = f"{boot.strip()} {Path('/proc/self/ns/pid').readlink()}"
    return {"system": system, "id": os.getpid(), "started": psutil.Process().create_time()}


def _kill(process: dict[str, Any], if_status: str | None = None) -> bool:
    """End what `_this_process` told of on a rank, if it is on this machine and still there, and is
    in that state; whether it was. One that does not run its code does not heed any other signal."""
    if process["system"] != _this_process()["system"]:
        return False
    try:
        found = psutil.Process(process["id"])
        # The start is counted in hundredths of a second.
        is_same = abs(found.create_time() - process["started"]) < 1.0
        if not is_same or if_status not in (None, found.status()):
            return False
        found.send_signal(signal.SIGKILL)
    except psutil.Error:  # it has gone, or is another user's
        return False
    return True

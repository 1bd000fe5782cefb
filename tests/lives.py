"""Runs of the program in processes of their own, to which things happen at chosen moments."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from tests.harness import free_port
from tests.programs import SHORT_TEXT
from uoe_parallel.pretrain import main

_CONTEXT = multiprocessing.get_context("forkserver")  # of the tests' ranks: torch is loaded
SECONDS = 90
"""In which a life has to be over."""
GRACE = 20
"""Seconds in which the others have to follow the first one that ends badly."""


class Planted(Protocol):
    """What is done to the code of a rank before it calls the program."""

    @property
    def rank(self) -> int: ...

    def plant(self) -> None: ...


@dataclass(frozen=True)
class Happening:
    """A signal that a rank gets when it calls something."""

    signal: signal.Signals
    rank: int
    place: str
    """What is called, such as "package.module:Class.method"."""
    call: int = 1
    """Which one in the process's life, from 1."""
    torn: str = ""
    """A file that gets the first half of a line before."""

    def plant(self) -> None:
        module, _, path = self.place.partition(":")
        *parents, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        real, calls = getattr(owner, name), 0

        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                if self.torn:
                    with Path(self.torn).open("a") as file:
                        file.write('{"step": 1, "kind": "tr')
                os.kill(os.getpid(), self.signal)
            return real(*args, **kwargs)

        setattr(owner, name, method)


@dataclass(frozen=True)
class Life:
    """How the program ended on each rank, and what it said."""

    codes: list[int | None]
    """Of the processes: minus a signal that ended one, None for one that had to be ended."""
    out: list[str]
    err: list[str]


def live(
    log: Path,
    world_size: int,
    *arguments: str | Path,
    happenings: Sequence[Planted] = (),
    own: Mapping[int, Sequence[str | Path]] | None = None,
) -> Life:
    """Call the program on `world_size` ranks. `log`: a folder for what they say; `own`: arguments
    that a rank has more than others."""
    log.mkdir(exist_ok=True)
    processes, port = [], free_port()
    for rank in range(world_size):
        words = [str(word) for word in (*arguments, *(own or {}).get(rank, ()))]
        planted = [happening for happening in happenings if happening.rank == rank]
        process = _CONTEXT.Process(target=_rank, args=(rank, world_size, port, log, words, planted))
        processes.append(process)
    try:
        for process in processes:
            process.start()
        _wait_for_all(processes)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = {
        name: [(log / f"{name}-{rank}").read_text() for rank in range(world_size)]
        for name in ("out", "err")
    }
    return Life(codes, **said)


def _wait_for_all(processes: Sequence[Any]) -> None:
    deadline = time.monotonic() + SECONDS
    living = list(processes)
    while living and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in living], left)
        ended = [process for process in living if process.exitcode is not None]
        if any(process.exitcode != 0 for process in ended):
            deadline = min(deadline, time.monotonic() + GRACE)
        living = [process for process in living if process not in ended]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    arguments: list[str],
    happenings: Sequence[Planted],
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(world_size))
    for name, descriptor in (("out", 1), ("err", 2)):
        with (log / f"{name}-{rank}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    for happening in happenings:
        happening.plant()
    with patch("uoe_parallel.training.generation._SAMPLING", SHORT_TEXT):
        sys.exit(main(arguments))

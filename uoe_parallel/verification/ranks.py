"""Ranks on this machine: fresh processes for every run, forked from one that has the libraries.

A process that trained keeps process groups and counters of Megatron's and DeepSpeed's in module
globals, so that none is used twice.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pkgutil
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from uoe_parallel.errors import UserError
from uoe_parallel.parallel.environment import variables

GRACE = 5.0
"""Seconds that the other ranks get to end by themselves once one has failed."""
SHOWN_CHARACTERS = 4000
HOST = "127.0.0.1"
THREADS = "OMP_NUM_THREADS"
NAME = "verified rank"
"""Of rank processes."""


@dataclass(frozen=True)
class Failure:
    """Why a run has no result."""

    summary: str
    """Which ranks failed how, and which did not finish."""
    details: str
    """Tracebacks and output."""
    mistake: str | None = None
    """A UserError's message, if that is what it was."""


@dataclass(frozen=True)
class _Report:
    """What a rank says at its end."""

    value: object = None
    error: str = ""
    traceback: str = ""
    is_mistake: bool = False


class LocalRanks:
    """Runs a function on 1 to N ranks. Nothing is left of a run when it has ended."""

    def __init__(self) -> None:
        """Starts importing the libraries in the background."""
        # A process that has looked for GPUs can't be forked.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        self._context: Any = multiprocessing.get_context(method)
        if not torch.cuda.is_available():
            # The server must not start a thread, as numpy's OpenBLAS would.
            with variables({"DS_ACCELERATOR": "cpu", THREADS: "1"}):
                multiprocessing.set_forkserver_preload(["uoe_parallel.training.trainer"])
                forkserver.ensure_running()

    def wait_until_ready(self) -> None:
        """Until the libraries are there, so that no run has to wait for them."""
        idle = self._context.Process(target=_do_nothing)
        idle.start()
        idle.join()

    def run(
        self,
        world_size: int,
        function: str,
        *arguments: object,
        logs: Path,
        timeout: float,
    ) -> Any | Failure:
        """Call the function named "package.module:function" with `arguments` on every rank.

        The ranks find torchrun's variables. They write to `logs`/rank-<n>.log. Ranks that have not
        finished after `timeout` seconds, or soon after another one failed, are killed. Returns what
        rank 0 returned, or a Failure.
        """
        logs.mkdir(parents=True, exist_ok=True)
        # Torchrun's way: the launcher holds the store at which ranks meet, on a free port.
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                environment = _torchrun_variables(rank, world_size, store.port)
                call = (environment, function, arguments)
                ranks.append(_Rank(self._context, _log(logs, rank), timeout, call))
            unfinished = _wait(ranks, timeout)
        finally:
            # Also when the user interrupts: nobody may stay behind.
            for rank in ranks:
                rank.end()
        if all(rank.report is not None and not rank.report.error for rank in ranks):
            assert ranks[0].report is not None
            return ranks[0].report.value
        return _failure(ranks, unfinished, timeout)


class _Rank:
    """One process, from its start to its report."""

    def __init__(
        self,
        context: Any,
        log: Path,
        timeout: float,
        call: tuple[Mapping[str, str], str, tuple[Any, ...]],
    ) -> None:
        self.log = log
        self.report: _Report | None = None
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(name=NAME, target=_serve, args=(theirs, log, timeout, *call))
        self.process.start()
        theirs.close()

    def receive(self) -> None:
        """Take the report, for which the process has to be waited for; dead ones send none."""
        try:
            self.report = self.connection.recv()
        except EOFError:
            self.process.join(GRACE)

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-SHOWN_CHARACTERS:].strip()


def _wait(ranks: list[_Rank], timeout: float) -> list[int]:
    """Wait for reports; returns the ranks that didn't end in time, in the order of ranks."""
    # A little longer than it takes them to write where they hang.
    deadline = time.monotonic() + timeout + 1
    pending = {rank.connection: number for number, rank in enumerate(ranks)}
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending), left):
            rank = ranks[pending.pop(connection)]  # pyright: ignore[reportArgumentType]
            rank.receive()
            if rank.report is None or rank.report.error:
                deadline = min(deadline, time.monotonic() + GRACE)
    return sorted(pending.values())


def _failure(ranks: list[_Rank], unfinished: list[int], timeout: float) -> Failure:
    mistakes = [rank.report.error for rank in ranks if rank.report and rank.report.is_mistake]
    if mistakes:
        return Failure(mistakes[0], "", mistakes[0])
    failed: dict[int, str] = {}
    for number, rank in enumerate(ranks):
        if rank.report is None and number not in unfinished:
            failed[number] = f"died with exit code {rank.process.exitcode}"
        elif rank.report is not None and rank.report.error:
            failed[number] = rank.report.error
    parts = [f"rank {number}: {error}" for number, error in failed.items()]
    if unfinished:
        when = "after another failed" if failed else f"in {timeout:g} s"
        names = ", ".join(map(str, unfinished))
        parts.append(f"rank{'s' * (len(unfinished) > 1)} {names} did not finish {when}")
    return Failure("; ".join(parts), "\n".join(_details(ranks, [*failed, *unfinished])))


def _details(ranks: list[_Rank], numbers: list[int]) -> Iterator[str]:
    """What each of these ranks left: causes come before their victims."""
    for number in numbers:
        rank = ranks[number]
        yield f"----- rank {number} of {len(ranks)}"
        yield rank.report.traceback.rstrip() if rank.report else rank.output()


def _serve(
    connection: Connection,
    log: Path,
    timeout: float,
    environment: Mapping[str, str],
    function: str,
    arguments: tuple[Any, ...],
) -> None:
    """The life of a rank."""
    _write_to(log)
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(int(environment[THREADS]))  # torch has been imported long ago
    try:
        report = _Report(pkgutil.resolve_name(function)(*arguments))
    except UserError as error:
        report = _Report(error=str(error), is_mistake=True)
    except Exception as error:
        text = " ".join(str(error).split())
        report = _Report(error=f"{type(error).__name__}: {text}", traceback=traceback.format_exc())
    connection.send(report)


def _do_nothing() -> None:
    """The life of a process that is waited for."""


def _end_with_parent() -> None:
    # A rank that waits for others would outlive a program that was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _threads(world_size: int) -> str:
    """Of each rank: what the user says, or its share of this process's cores."""
    cores = len(os.sched_getaffinity(0))
    return os.environ.get(THREADS) or str(max(1, cores // world_size))


def _torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        THREADS: _threads(world_size),
        # All ranks are here, whatever this host's name resolves to.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"

"""The test process's side: start ranks once, run cases on them, name whoever fails."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

import psutil

from tests.device import chosen_device, skip_without_gpus
from tests.harness.messages import DIED, HANGING, Case, RankFailure, Success
from tests.harness.rank import STACKS_SIGNAL, serve

R = TypeVar("R")

GRACE = 2.0
"""Seconds that the other ranks get to end by themselves once one has failed."""
OUTPUT_CHARACTERS = 6000
WORN = 40
"""Threads of an idle rank from which on it is replaced. ZeRO's hooks keep engines alive that nobody
knows any more, these keep their groups, and every group of gloo has threads that wake up often."""
PRELOAD = ["numpy", "pydantic", "yaml", "safetensors.torch", "hypothesis", "pytest", "torch"]
"""Imported once, in a server that ranks are forked from. It must never start a thread."""
PRELOAD_ON_CPU = [
    *("deepspeed", "deepspeed.runtime.sequence_parallel.parallel_state_sp", "megatron.core"),
    *("megatron.core.parallel_state", "megatron.core.tensor_parallel"),
    *("tests.harness.groups", "uoe_parallel.pretrain", "uoe_parallel.training.trainer"),
]
"""Likewise; where there are GPUs these look for them, and who has looked can't be forked."""


class RankError(Exception):
    """A case failed on at least one rank."""

    def __init__(self, case: str, world_size: int, failures: Mapping[int, RankFailure]) -> None:
        self.case = case
        self.world_size = world_size
        self.failures = dict(failures)
        """By rank; ranks that returned a result are not in it."""
        hanging = {rank for rank, failure in failures.items() if failure.type_name == HANGING}
        text = [f"{case}: world size {world_size}: {_verdict(failures.keys() - hanging, hanging)}"]
        # Causes before their victims.
        for rank in [*sorted(failures.keys() - hanging), *sorted(hanging)]:
            text += [f"----- rank {rank} of {world_size}: {failures[rank]}"]
        super().__init__("\n".join(text))


def _verdict(failed: Set[int], hanging: Set[int]) -> str:
    """`rank 1 failed; rank 0, 2 did not finish`"""
    parts = [(failed, "failed"), (hanging, "did not finish")]
    return "; ".join(
        f"rank {', '.join(map(str, sorted(ranks)))} {what}" for ranks, what in parts if ranks
    )


def start_server(folder: Path) -> None:
    """Start importing PRELOAD in the background. Ranks get the environment set here."""
    device = chosen_device()
    environment = {
        "DS_ACCELERATOR": device,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # Not the user's: a build that was killed there leaves a lock that hangs later runs.
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    on_cpu = device == "cpu"
    multiprocessing.set_forkserver_preload(PRELOAD + PRELOAD_ON_CPU if on_cpu else PRELOAD)
    with _environment(environment):
        forkserver.ensure_running()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Worker:
    """One rank process and the log of its current case."""

    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self._log = log
        # Not a daemon: cases may start processes of their own.
        self.process = context.Process(target=serve, args=(theirs, log), daemon=False)
        self.process.start()
        theirs.close()

    def send(self, case: Case) -> None:
        if self._log.exists():
            os.truncate(self._log, 0)
        self.connection.send_bytes(pickle.dumps(case))

    def receive(self) -> Success | RankFailure:
        """The outcome of the case; waits for it, or for the process to end."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            return RankFailure(DIED, f"exit code {self.process.exitcode}")

    def output(self) -> str:
        return self._log.read_text(errors="replace")[-OUTPUT_CHARACTERS:].strip()

    def write_stacks(self) -> None:
        """Ask for the stacks of all threads and wait until they stop growing."""
        assert self.process.pid is not None
        os.kill(self.process.pid, STACKS_SIGNAL)
        size, deadline = -1, time.monotonic() + 2
        while size != (size := self._log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)

    def is_usable(self) -> bool:
        """Whether it lives and carries little of its past."""
        if not self.process.is_alive():
            return False
        return psutil.Process(self.process.pid).num_threads() < WORN

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(5)

    def close(self) -> None:
        """End an idle process gently, so that its own exit handlers run."""
        self.connection.close()
        self.process.join(5)
        self.kill()


class Ranks:
    """`ranks(world_size)` is a RankPool. One set of processes serves all world sizes.

    A process is started when a case first needs it. It stays until `close`, until a case kills it
    or has to be killed, or until it is worn; it is then replaced at the next use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: dict[int, _Worker] = {}
        self._cases = itertools.count()
        start_server(folder)
        atexit.register(self.close)

    def __call__(self, world_size: int) -> RankPool:
        return RankPool(self, world_size)

    @property
    def pids(self) -> list[int]:
        """Process ids of the living ranks."""
        return [w.process.pid for w in self._workers.values() if w.process.pid is not None]

    def close(self) -> None:
        """End all ranks. Safe to call again; a later case starts new ones."""
        atexit.unregister(self.close)
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def run(self, world_size: int, call: bytes, timeout: float) -> list[Success | RankFailure]:
        """Run a pickled (function, args, kwargs) on ranks 0 to world_size - 1.

        Ranks that have no outcome when the time is over, or when another rank has failed, are
        killed. Returns outcomes ordered by rank.
        """
        for rank in range(world_size):
            worker = self._workers.get(rank)
            if worker is not None and worker.is_usable():
                continue
            if worker is not None:
                worker.close()
            self._workers[rank] = _Worker(self._folder / f"rank{rank}.log")
        store = self._folder / f"case{next(self._cases)}"
        case = Case(call, 0, world_size, store, free_port())
        outcomes: dict[int, Success | RankFailure] = {}
        try:
            for rank in range(world_size):
                self._workers[rank].send(replace(case, rank=rank))
            self._collect(outcomes, world_size, timeout)
        finally:
            # Also when the test itself is interrupted: nobody may find half a case running.
            for rank in set(range(world_size)) - outcomes.keys():
                self._workers[rank].kill()
            store.unlink(missing_ok=True)
        return [outcomes[rank] for rank in range(world_size)]

    def _collect(
        self, outcomes: dict[int, Success | RankFailure], world_size: int, timeout: float
    ) -> None:
        deadline = time.monotonic() + timeout
        reason = f"not finished after {timeout:g} s"
        pending = {self._workers[rank].connection: rank for rank in range(world_size)}
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                rank = pending.pop(connection)  # pyright: ignore[reportArgumentType]
                outcome = self._workers[rank].receive()
                if isinstance(outcome, RankFailure):
                    outcome = replace(outcome, output=self._workers[rank].output())
                    deadline = min(deadline, time.monotonic() + GRACE)
                    reason = "not finished when another rank failed"
                outcomes[rank] = outcome
        for rank in pending.values():
            self._workers[rank].write_stacks()
        for rank in pending.values():
            self._workers[rank].kill()
            outcomes[rank] = RankFailure(HANGING, reason, output=self._workers[rank].output())


@dataclass(frozen=True)
class RankPool:
    """The ranks of one world size."""

    ranks: Ranks
    world_size: int

    def run(
        self, function: Callable[..., R], *args: object, timeout: float = 60, **kwargs: object
    ) -> list[R]:
        """Call `function(*args, **kwargs)` on every rank; results ordered by rank.

        `function` is defined at the top of a module. Each rank finds torch.distributed started
        with gloo (on CUDA with NCCL too, and the rank with a GPU of its own) and torchrun's
        variables set, one thread, seed 0, and no other process group.

        Raises RankError when a rank raises, dies, or takes more than `timeout` seconds.
        """
        __tracebackhide__ = True
        skip_without_gpus(self.world_size)
        case = f"{_current_test()}{function.__qualname__}"
        call = pickle.dumps((function, args, kwargs))
        outcomes = self.ranks.run(self.world_size, call, timeout)
        failures = {rank: o for rank, o in enumerate(outcomes) if isinstance(o, RankFailure)}
        if failures:
            raise RankError(case, self.world_size, failures)
        return [pickle.loads(o.value) for o in outcomes if isinstance(o, Success)]


def _current_test() -> str:
    """`path::test[parameters], ` while pytest runs a test."""
    name, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")
    return f"{name}, " if name else ""


def free_port() -> int:
    """Of this machine, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

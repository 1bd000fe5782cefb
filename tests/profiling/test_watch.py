"""Ranks that do not come are named, and the run ends everywhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness import Ranks, free_port
from tests.lives import live
from tests.model.cases import start
from tests.profiling.hanging import SLEEPING, STOPPED, rank
from tests.programs import write_run
from tests.tiny import tiny_config
from uoe_parallel.analysis.observe import Call
from uoe_parallel.errors import HANG_EXIT_CODE
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling import watch


@pytest.mark.usefixtures("ranks")
def test_ranks_that_hang_are_named_and_all_end(tmp_path: Path) -> None:
    # More than the ranks of a tiny run wait for each other on a busy machine.
    config = write_run(tmp_path, training={"global_batch_size": 6}, profile={"wait_limit": 3})
    port = free_port()
    complaints = [tmp_path / f"complaints-{number}" for number in range(3)]
    processes = [_start(number, config, port, file) for number, file in enumerate(complaints)]
    try:
        for process in processes:
            process.join(90)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert codes == [HANG_EXIT_CODE, HANG_EXIT_CODE, -signal.SIGKILL]
    told = [
        [line for line in file.read_text().splitlines() if "uoe-" in line] for file in complaints
    ]
    assert told[SLEEPING] == told[STOPPED] == []
    assert told[0] == [
        "uoe-pretrain: rank 0 has waited longer than profile.wait_limit, 3 s, in all_reduce for "
        "whether to take the step (step) over ranks 0, 1, 2 of the world group, in step 1. Not "
        "there: rank 1, which is in code of its own; rank 2, which does not answer: stopped or gone"
    ]


@dataclass(frozen=True)
class _Building:
    """Rank 1 builds its engine until rank 0 has found it missing, and then is stopped."""

    rank: int
    found: Path

    def plant(self) -> None:
        owner: Any
        if self.rank == 0:
            owner, name = watch.Watch, "_silent"
        else:
            owner, name = import_module("uoe_parallel.training.trainer"), "build_engine"
        real = getattr(owner, name)

        def planted(*args: Any) -> Any:
            if self.rank == 0:
                result = real(*args)
                self.found.touch()
                return result
            while not self.found.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGSTOP)
            return real(*args)

        setattr(owner, name, planted)


@pytest.mark.usefixtures("ranks")
@pytest.mark.slow
def test_rank_that_builds_for_long_is_waited_for_until_it_is_silent(tmp_path: Path) -> None:
    config = write_run(tmp_path, profile={"wait_limit": 1})
    planted = [_Building(rank, tmp_path / "found") for rank in range(2)]
    life = live(tmp_path / "log", 2, "--config", config, happenings=planted)
    assert life.codes == [HANG_EXIT_CODE, -signal.SIGKILL], life
    assert life.err[0].count("uoe-pretrain: ") == 1 and life.err[1] == ""
    assert "before the first step. Not there: rank 1, which does not answer" in life.err[0]


@dataclass(frozen=True)
class _StuckDisk:
    """Rank 1 never comes to the end of writing a checkpoint."""

    rank: int = 1

    def plant(self) -> None:
        store: Any = import_module("uoe_parallel.checkpoint.store")
        store.save_file = lambda *_: threading.Event().wait()


@pytest.mark.usefixtures("ranks")
def test_rank_that_hangs_in_writing_beside_training_is_named(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, checkpoint={"every": 1, "asynchronous": True}, profile={"wait_limit": 2}
    )
    life = live(tmp_path / "log", 2, "--config", config, happenings=[_StuckDisk()])
    assert life.codes == [HANG_EXIT_CODE] * 2, life
    [told] = [line for line in life.err[0].splitlines() if "uoe-" in line]
    assert "agreement (beside training) over ranks 0, 1 of the world group" in told
    assert told.endswith("Not there: rank 1, which still writes")


def _start(number: int, config: Path, port: int, complaints: Path) -> BaseProcess:
    """A rank of three, by itself: a launcher takes half a minute to end one that is stopped."""
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    environment = {name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()}
    environment["MASTER_ADDR"] = "127.0.0.1"
    context = multiprocessing.get_context("forkserver")  # of the tests' ranks: torch is loaded
    process = context.Process(target=rank, args=(number, environment, config, complaints))
    process.start()
    return process


class _Mark:
    """As a CUDA event, which a stream comes past when the test says so."""

    def __init__(self, made: list[_Mark]) -> None:
        self.is_past = False
        made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.is_past


def _late_on_a_stream() -> list[int | None]:
    """Numbers of the collectives that a stream waits for, as it comes past one after the other."""
    groups, now = start(tiny_config()), 0.0
    marks: list[_Mark] = []
    late: list[int | None] = []
    call = Call("all_reduce", groups.world, (0,), Purpose.HEAD, "forward", 8, 0, False, (0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Event", lambda: _Mark(marks))
        patch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
        watched = watch.Watch(groups, limit=5.0)

        def look() -> None:
            found = watched._late()
            late.append(None if found is None else found.number)

        for _ in range(3):
            note = watched.called(call)
            watched.waits(note)
            watched.waited(note)  # the caller goes on at once
        now = 6.0
        look()
        for mark in marks:
            mark.is_past = True
            look()  # the next one's waiting begins
            now += 6.0
            look()
    return late


def test_a_stream_that_waits_is_seen_when_its_caller_has_gone_on(ranks: Ranks) -> None:
    """Also at a collective that was queued while an earlier one had not ended."""
    assert ranks(1).run(_late_on_a_stream)[0] == [1, None, 2, None, 3, None, None]

"""Of two runs that write one folder, one ends and says who the other is."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.programs import Outcome, call_program, only_complaint, write_run
from uoe_parallel.errors import UserError
from uoe_parallel.training import run_lock
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.run_lock import RunLock


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)


def test_second_run_is_told_of_the_first(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()}, since"):
        second.acquire()
    first.confirm()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    second.release()


def test_run_waits_for_one_that_is_leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    monkeypatch.setattr(run_lock, "PATIENCE", 60.0)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: first.release())
    second.acquire()
    second.confirm()
    second.release()


def _hold(folder: Path, connection: Connection) -> None:
    lock = RunLock(folder)
    lock.acquire()
    connection.send_bytes(b"held")
    connection.recv_bytes()


@pytest.mark.usefixtures("ranks")
def test_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv_bytes() == b"held"
        lock = RunLock(tmp_path)
        with pytest.raises(UserError, match=f"process {process.pid} "):
            lock.acquire()
    finally:
        process.kill()
        process.join()
    assert str(process.pid) in (tmp_path / "lock").read_text()
    lock.acquire()
    lock.release()


def test_lock_of_a_file_that_was_taken_away_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder leaves between another's opening of the file and its lock."""
    flock, lock = fcntl.flock, RunLock(tmp_path)

    def take_away(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(run_lock, "PATIENCE", 60.0)
    monkeypatch.setattr(fcntl, "flock", take_away)
    lock.acquire()
    lock.confirm()
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    with pytest.raises(UserError):
        RunLock(tmp_path).acquire()
    lock.release()


def test_without_locks_of_the_file_system_the_last_to_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    first.confirm()
    second.acquire()
    with pytest.raises(UserError, match=f"another run by now, of process {os.getpid()}"):
        first.confirm()
    first.release()
    second.confirm()
    second.release()


def _call_impatiently(act: Callable[[Path], None] | None, config: Path, run: Path) -> Outcome:
    """The program, which does not wait for others; `act` is called by rank 0 after each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "PATIENCE", 0.0)
        if act is not None and os.environ["RANK"] == "0":
            patch.setattr(TrainingConsole, "report", lambda *_: act(run))
        return call_program("--config", config)


def test_program_leaves_the_files_of_a_running_one_alone(ranks: Ranks, tmp_path: Path) -> None:
    config, run = write_run(tmp_path, parallel={"tensor": 2}), tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    lock.acquire()
    (run / "metrics.jsonl").write_text('{"step": 9, "kind": "train"}\n')
    before = {path: path.read_bytes() for path in run.rglob("*")}
    message = only_complaint(ranks(2).run(_call_impatiently, None, config, run))
    assert str(run) in message and f"process {os.getpid()} on " in message
    assert {path: path.read_bytes() for path in run.rglob("*")} == before
    lock.release()


def _take_over(run: Path) -> None:
    (run / "lock").write_text("process 1 on another-host, since yesterday")


def test_program_stops_before_it_writes_beside_a_run_that_took_over(
    ranks: Ranks, tmp_path: Path
) -> None:
    config, run = write_run(tmp_path, parallel={"tensor": 2}), tmp_path / "run"
    message = only_complaint(ranks(2).run(_call_impatiently, _take_over, config, run))
    assert "process 1 on another-host, since yesterday" in message
    assert not (run / "checkpoints").exists()
    assert (run / "lock").read_text().startswith("process 1 ")

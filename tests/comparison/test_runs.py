"""Runs are started once, go on where they stopped, and are ended with what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.comparison.cases import comparison, quiet
from tests.programs import CHECKOUT
from uoe_parallel.comparison.collect import outcome
from uoe_parallel.comparison.contenders import models
from uoe_parallel.comparison.plan import Plan, Training
from uoe_parallel.comparison.runs import Runner
from uoe_parallel.comparison.settings import ComparisonConfig
from uoe_parallel.config.load import save_config
from uoe_parallel.errors import UserError


def _tries(given: ComparisonConfig) -> list[Training]:
    return Plan(given, models(given)).sweep()


def _starts(training: Training) -> int:
    started = training.folder / "started"
    return len(started.read_text()) if started.exists() else 0


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    given = comparison(tmp_path)
    tries, said = _tries(given), list[str]()
    Runner(given.launch, 2, said.append).run(tries[:2])
    Runner(given.launch, 2, said.append).run(tries)
    assert [_starts(training) for training in tries] == [1] * 6
    assert all(outcome(training) is not None for training in tries)
    assert said[2] == "2 of 6 runs are done already" and said[-1].startswith("6/6 ")


def test_jobs_share_the_cores(tmp_path: Path) -> None:
    before = '(run_dir / "threads").write_text(__import__("os").environ["OMP_NUM_THREADS"])'
    given = comparison(tmp_path, before)
    [first, *_] = _tries(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
        Runner(given.launch, 2, quiet).run([first])
    assert (first.folder / "threads").read_text() == "3"


def test_a_run_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    given = comparison(tmp_path, 'sys.exit("out of luck") if rate == 0.02 else None')
    tries = _tries(given)
    with pytest.raises(UserError) as caught:
        Runner(given.launch, 1, quiet).run(tries)
    told = str(caught.value)
    assert told.startswith(f"{tries[1]}: ended with exit code 1") and "out of luck" in told
    assert [_starts(training) for training in tries] == [1, 1, 0, 0, 0, 0]


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    given = comparison(tmp_path)
    [first, second, *_] = _tries(given)
    first.folder.mkdir(parents=True)
    save_config(second.config, first.folder / "config.yaml")
    with pytest.raises(UserError, match=f"{first.folder} has a run with another config"):
        Runner(given.launch, 1, quiet).run([first])
    assert _starts(first) == 0


def test_who_ends_the_program_ends_its_runs(tmp_path: Path) -> None:
    """And they are told, so that they save."""
    given = comparison(
        tmp_path,
        textwrap.dedent("""
        import signal
        def leave(*_):
            (run_dir / "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, leave)
        (run_dir / "pid").write_text(str(__import__("os").getpid()))
        time.sleep(60)
        """),
    )
    tries = _tries(given)
    path = tmp_path / "comparison.yaml"
    path.write_text(given.model_dump_json())
    program = CHECKOUT / "tools" / "compare_quality.py"
    command = [sys.executable, program, "--config", path, "--jobs", "2"]
    process = subprocess.Popen(command, cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": "."})
    pids = [training.folder / "pid" for training in tries[:2]]
    deadline = time.monotonic() + 60
    while not all(pid.exists() and pid.read_text() for pid in pids):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert all((training.folder / "saved").exists() for training in tries[:2])
    assert not any(psutil.pid_exists(int(pid.read_text())) for pid in pids)
    assert sum(map(_starts, tries)) == 2

"""A rank that does not come is named, and the run ends everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import Ranks
from tests.programs import CHECKOUT, call_program, launch, script, write_run
from uoe_parallel.profiling.watch import HANG_EXIT_CODE

HANGING = CHECKOUT / "tests/profiling/hanging.py"
LIMIT = 4
"""Seconds: more than the ranks of a tiny run wait for each other on a busy machine."""


def _write_run(folder: Path, limit: float = LIMIT) -> Path:
    return write_run(folder, parallel={"tensor": 2}, profile={"wait_limit": limit})


def test_a_rank_that_sleeps_ends_with_all_others(tmp_path: Path) -> None:
    torchrun = [script("torchrun"), "--standalone", "--nproc-per-node", "2"]
    ended = launch([*torchrun, HANGING, "sleeps", _write_run(tmp_path)])
    assert ended.code != 0
    (report,) = (line for line in ended.err.splitlines() if line.startswith("uoe-pretrain:"))
    assert "rank 0 has waited longer than profile.wait_limit, 4 s" in report
    assert "reduce_scatter for embedding (forward) over ranks 0, 1 of the tensor group" in report
    assert "in or after step 1. " in report
    assert report.endswith("Not there: rank 1, which is in code of its own")


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    config = _write_run(tmp_path)
    processes = [_start(rank, config, 29000 + os.getpid() % 1000) for rank in range(2)]
    try:
        _, err = processes[0].communicate(timeout=90)
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == HANG_EXIT_CODE
    assert "Not there: rank 1, which does not answer: stopped or gone" in err
    assert err.count("uoe-pretrain:") == 1


def _start(rank: int, config: Path, port: int) -> subprocess.Popen[str]:
    """A rank of two, by itself."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, str(HANGING), "stops", str(config)],
        env=os.environ | {name: str(value) for name, value in places.items()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_goes_well_is_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks(2).run(call_program, "--config", _write_run(tmp_path, limit=60))
    assert [outcome.code for outcome in outcomes] == [0, 0]

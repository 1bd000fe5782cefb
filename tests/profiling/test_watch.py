"""Ranks that do not come are named, and the run ends everywhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.harness import Ranks
from tests.programs import CHECKOUT, call_program, write_run
from uoe_parallel.profiling.watch import HANG_EXIT_CODE

SLEEPING, STOPPED = 1, 2
"""Ranks of `hanging.py`."""


def test_ranks_that_hang_are_named_and_all_end(tmp_path: Path) -> None:
    # More than the ranks of a tiny run wait for each other on a busy machine.
    config = write_run(tmp_path, training={"global_batch_size": 6}, profile={"wait_limit": 5})
    port = _free_port()
    processes = [_start(rank, config, port) for rank in range(3)]
    try:
        complaints = [processes[rank].communicate(timeout=90)[1] for rank in (0, SLEEPING)]
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert codes == [HANG_EXIT_CODE, HANG_EXIT_CODE, None]
    report, nothing = ([line for line in err.splitlines() if "uoe-" in line] for err in complaints)
    assert nothing == []
    assert report == [
        "uoe-pretrain: rank 0 has waited longer than profile.wait_limit, 5 s, in all_reduce for "
        "smallest and largest token (step) over ranks 0, 1, 2 of the data group, in step 1. Not "
        "there: rank 1, which is in code of its own; rank 2, which does not answer: stopped or gone"
    ]


def _start(rank: int, config: Path, port: int) -> subprocess.Popen[str]:
    """A rank of three, by itself: a launcher takes half a minute to end one that is stopped."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.profiling.hanging", str(config)],
        cwd=CHECKOUT,
        env=os.environ | {name: str(value) for name, value in places.items()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_run_that_goes_well_is_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, parallel={"tensor": 2}, profile={"wait_limit": 60})
    outcomes = ranks(2).run(call_program, "--config", config)
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * 2

"""A rank that is killed while a checkpoint is written costs that checkpoint, no more."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.lives import Happening, live
from tests.programs import call_program, curves, write_run
from uoe_parallel.checkpoint.folders import list_checkpoints

STEPS = 5
STORE = "uoe_parallel.checkpoint.store"
FOLDERS = "uoe_parallel.checkpoint.folders"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_saves_leave_no_trace(ranks: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    run = tmp_path / "run"
    config = write_run(
        tmp_path,
        model={"task": "masked_token"},  # of which nothing is sampled
        training={"steps": STEPS},
        checkpoint={"every": 2, "asynchronous": asynchronous},
    )
    half = run / "checkpoints" / "step-00000002.partial" / "rank-00001.safetensors"
    whole = run / "checkpoints" / "step-00000004.partial"
    in_a_shard = Happening(signal.SIGKILL, 1, f"{STORE}:save_file", 1, torn=str(half))
    at_the_end = Happening(signal.SIGKILL, 0, f"{FOLDERS}:publish", 2)
    for happening, left, kept in (
        (in_a_shard, half, []),
        (at_the_end, whole / "manifest.json", ["step-00000002"]),
    ):
        life = live(tmp_path / "log", 2, "--config", config, happenings=[happening])
        assert life.codes[happening.rank] == -signal.SIGKILL, life
        assert life.codes[1 - happening.rank] not in (0, None), life
        assert left.exists()
        assert [path.name for path in list_checkpoints(run / "checkpoints")] == kept
    life = live(tmp_path / "log", 2, "--config", config)
    assert life.codes == [0, 0] and f"2 of {STEPS} steps are done" in life.out[0], life
    assert not list((run / "checkpoints").glob("*.partial"))

    straight = ("--config", config, f"run_dir={tmp_path / 'straight'}", "checkpoint.every=0")
    assert [outcome.code for outcome in ranks(2).run(call_program, *straight)] == [0, 0]
    assert curves(run) == curves(tmp_path / "straight")

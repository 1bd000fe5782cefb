"""A rank that is killed at any moment costs the steps since the last checkpoint, no more."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.harness import Ranks
from tests.lives import Happening, live
from tests.programs import call_program, curves, metrics, write_run
from uoe_parallel.checkpoint.folders import list_checkpoints, step_of

STEPS, EVERY = 8, 2
ZERO = "deepspeed.runtime.zero.stage_1_and_2"
METRICS = "uoe_parallel.training.metrics:MetricsWriter"
ENGINE = "uoe_parallel.training.engine:TrainingEngine"


def _kill(rank: int, place: str, call: int, torn: str = "") -> Happening:
    return Happening(signal.SIGKILL, rank, place, call, torn)


def test_killed_ranks_are_restarted_without_a_trace(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        training={"steps": STEPS, "validate_every": 4},
        checkpoint={"every": EVERY, "keep": 9},
    )
    run = tmp_path / "run"
    lives = [
        # Where a life starts, and at which of its calls it ends.
        (0, _kill(0, f"{ENGINE}.token_losses", 2)),  # before the first checkpoint
        (0, _kill(1, f"{ZERO}:all_gather_dp_groups", 4)),  # in the optimizer's step
        (2, _kill(1, f"{ENGINE}.evaluate", 1)),  # the validation of step 4, before its checkpoint
        (2, _kill(0, f"{METRICS}.write", 5, torn=str(run / "metrics.jsonl"))),
        (4, _kill(1, f"{ENGINE}.token_losses", 4)),
        (6, _kill(0, f"{ENGINE}.evaluate", 2)),  # the test, after the last step
    ]
    for start, killed in lives:
        assert _newest(run) == start
        life = live(tmp_path / "log", 2, "--config", config, happenings=[killed])
        assert life.codes[killed.rank] == -signal.SIGKILL, life
        assert life.codes[1 - killed.rank] not in (0, None), life
        told = f"resuming from {run / 'checkpoints'}/step-{start:08d}: {start} of {STEPS}"
        assert (told in life.out[0]) == (start > 0)
    life = live(tmp_path / "log", 2, "--config", config)
    assert life.codes == [0, 0] and f"{STEPS} of {STEPS} steps are done" in life.out[0]

    straight = ("--config", config, f"run_dir={tmp_path / 'straight'}")
    assert [outcome.code for outcome in ranks(2).run(call_program, *straight)] == [0, 0]
    assert curves(run) == curves(tmp_path / "straight")
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))


def _newest(run: Path) -> int:
    return max(map(step_of, list_checkpoints(run / "checkpoints")), default=0)

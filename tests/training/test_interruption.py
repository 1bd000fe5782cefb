"""A signal to one rank ends all between two steps, with a checkpoint that loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.lives import Happening, Life, live
from tests.programs import call_program, curves, write_run
from uoe_parallel.training import interruption

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
STEPS = 5


def _config(folder: Path) -> Path:
    return write_run(
        folder,
        training={"steps": STEPS, "validate_every": 3},
        checkpoint={"every": 3, "keep": 9},
    )


def _saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def _goes(life: Life, signal: signal.Signals, said: str) -> None:
    assert life.codes == [128 + signal] * 2, life
    assert life.out[0].splitlines()[-1] == f"asked to leave by {said}, the same command continues"
    assert life.out[1] == "" and life.err == ["", ""]


def test_signals_end_all_ranks_between_steps(ranks: Ranks, tmp_path: Path) -> None:
    config, run = _config(tmp_path), tmp_path / "run"

    def life(*happenings: Happening) -> Life:
        return live(tmp_path / "log", 2, "--config", config, happenings=happenings)

    building = Happening(USR1, 1, "uoe_parallel.training.trainer:build_engine")
    _goes(life(building), USR1, "SIGUSR1 after step 0: nothing to save")
    assert not (run / "checkpoints").exists()
    forward = Happening(TERM, 1, "uoe_parallel.training.engine:TrainingEngine.token_losses", 2)
    _goes(life(forward), TERM, "SIGTERM after step 2: checkpoint saved")
    assert _saved(run) == [2]
    # The step's own checkpoint follows, and is not written twice.
    evaluate = "uoe_parallel.training.engine:TrainingEngine.evaluate"
    validating = life(Happening(TERM, 0, evaluate), Happening(TERM, 1, evaluate))
    _goes(validating, TERM, "SIGTERM after step 3: checkpoint saved")
    assert validating.out[0].count("checkpoint: ") == 1
    finishing = life(Happening(USR1, 1, evaluate))
    _goes(finishing, USR1, f"SIGUSR1 after step {STEPS}: checkpoint saved")
    assert _saved(run) == [2, 3, STEPS]
    assert life().codes == [0, 0]

    straight = ("--config", config, f"run_dir={tmp_path / 'straight'}")
    assert [outcome.code for outcome in ranks(2).run(call_program, *straight)] == [0, 0]
    assert curves(run) == curves(tmp_path / "straight")


def _wait_for_ever(patience: float, connection: Connection) -> None:
    interruption.PATIENCE = patience
    with interruption.Interruption() as noted:
        connection.send_bytes(b"waiting")
        while not noted.signal:
            threading.Event().wait(0.01)
        connection.send_bytes(b"asked")
        connection.poll(None)
    os._exit(0)


@pytest.mark.parametrize(("patience", "code"), [(0.0, 128 + TERM), (60.0, 0)])
@pytest.mark.usefixtures("ranks")
def test_process_that_hangs_ends_when_it_is_asked_again(patience: float, code: int) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_wait_for_ever, args=(patience, theirs))
    process.start()
    try:
        for _ in ("waiting", "asked"):
            assert ours.poll(60)
            ours.recv_bytes()
            assert process.pid is not None
            os.kill(process.pid, TERM)
        if patience:
            ours.send_bytes(b"enough")
        process.join(60)
        assert process.exitcode == code
    finally:
        process.kill()
        process.join()

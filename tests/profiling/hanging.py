"""Ranks of a run of which two do not come to the second step: rank 1 is in Python for ever, and
rank 2 is stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from uoe_parallel.pretrain import main

SLEEPING, STOPPED = 1, 2


def rank(number: int, environment: dict[str, str], config: Path, complaints: Path) -> None:
    """The life of a process: the program, whose stderr goes to a file."""
    os.environ.update(environment)
    with complaints.open("wb") as file:
        os.dup2(file.fileno(), 2)
    if number in (SLEEPING, STOPPED):
        _hang(number)
    sys.exit(main(["--config", str(config)]))


def _hang(number: int) -> None:
    from uoe_parallel.training.trainer import Trainer

    take_step: Any = Trainer.train_step

    def train_step(trainer: Trainer) -> object:
        if trainer.step == 1:
            if number == STOPPED:
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(1)
        return take_step(trainer)

    Trainer.train_step = train_step  # pyright: ignore[reportAttributeAccessIssue]

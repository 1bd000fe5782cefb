"""The program, of which two ranks do not come to the second step: rank 1 is in Python for ever, and
rank 2 is stopped. Its argument is the config."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from uoe_parallel.pretrain import main


def _hang(rank: int) -> None:
    from uoe_parallel.training.trainer import Trainer

    take_step: Any = Trainer.train_step

    def train_step(trainer: Trainer) -> object:
        if trainer.step == 1:
            if rank == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(1)
        return take_step(trainer)

    Trainer.train_step = train_step  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        _hang(int(os.environ["RANK"]))
    sys.exit(main(["--config", sys.argv[1]]))

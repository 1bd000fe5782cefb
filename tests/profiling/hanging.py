"""The program, of which one rank does not come to its second step: `hanging.py HOW CONFIG`.

With HOW "sleeps" it is in Python for ever, with "stops" its process is stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from uoe_parallel.pretrain import main


def _hang(how: str) -> None:
    from uoe_parallel.training.trainer import Trainer

    take_step: Any = Trainer.train_step

    def train_step(trainer: Trainer) -> object:
        if trainer.step == 1:
            print(f"process {os.getpid()} hangs", flush=True)
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(1)
        return take_step(trainer)

    Trainer.train_step = train_step  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        _hang(sys.argv[1])
    sys.exit(main(["--config", sys.argv[2]]))

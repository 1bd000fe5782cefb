"""The life of one rank process: wait for a case, run it in a fresh world, send the result."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.messages import Case, RankFailure, Success

if TYPE_CHECKING:
    from uoe_parallel.parallel.device import Device

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads to its log."""


def serve(connection: Connection, log: Path) -> None:
    """Run cases until the other end of `connection` is closed."""
    _write_to(log)
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test process's to handle.
    threading.Thread(target=_end_with_test_process, daemon=True).start()
    # What came with the fork never becomes garbage, and collections between cases skip it.
    gc.freeze()
    environment = dict(os.environ)
    while True:
        try:
            case: Case = pickle.loads(connection.recv_bytes())
            outcome = _run(case, environment)
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send_bytes(pickle.dumps(outcome))
        except (EOFError, BrokenPipeError):
            return


def _end_with_test_process() -> None:
    # A rank that hangs in a case would outlive a test process that was killed.
    test_process = multiprocessing.parent_process()
    assert test_process is not None
    test_process.join()
    os._exit(1)


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _run(case: Case, environment: dict[str, str]) -> Success | RankFailure:
    from tests.harness.placing import pickled, placing

    try:
        device = _start_world(case, environment)
        function, args, kwargs = pickle.loads(case.call)
        with placing(device):
            return Success(pickled(function(*args, **kwargs)))
    # Also SystemExit and pytest's own outcomes: a rank outlives whatever a case does.
    except BaseException as error:
        return RankFailure(type(error).__name__, str(error), traceback.format_exc())


def _start_world(case: Case, environment: dict[str, str]) -> Device:
    """Undo what the last case left behind, then join the ranks of this one."""
    import torch
    import torch.distributed as dist

    from tests.harness.groups import reset_groups
    from uoe_parallel.parallel.device import use_device

    reset_groups()
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(case.rank),
        LOCAL_RANK=str(case.rank),
        WORLD_SIZE=str(case.world_size),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(case.master_port),
    )
    device = use_device(case.rank)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    dist.init_process_group(
        device.backend,
        init_method=case.store.as_uri(),
        rank=case.rank,
        world_size=case.world_size,
    )
    return device

"""Programs and scripts as these tests start them, watch them and end them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.programs import CHECKOUT, MPIRUN_ANYWHERE

Process = subprocess.Popen[bytes]


def environment() -> dict[str, str]:
    """In which scripts find this Python and what is installed beside it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | MPIRUN_ANYWHERE | {"PATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def started(
    *command: str | Path, output: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """`command`, which writes to `output` and is told to end if the block leaves it running."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**environment(), **(variables or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def wait_until(condition: Callable[[], bool], process: Process, output: Path) -> None:
    """Wait while `process` runs; it fails if it ends before."""
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def has_written(path: Path, text: str, count: int = 1) -> Callable[[], bool]:
    """Whether a file has `text` by now, `count` times or more."""
    return lambda: path.exists() and path.read_text().count(text) >= count


def has_taken(steps: int, run_dir: Path) -> Callable[[], bool]:
    """Whether a run has reported `steps` steps by now."""
    return has_written(run_dir / "metrics.jsonl", '"kind": "train"', steps)

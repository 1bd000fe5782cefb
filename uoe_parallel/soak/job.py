"""A job under torchrun that is started again whenever its launcher ends, and what it tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from uoe_parallel.soak.plan import Plan

_TICK = 0.05
_PACE = 0.1
"""Seconds after a step, in which faults from outside can meet it."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Or ranks that torchrun starts again meet addresses of those before in its store.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
_RESTARTS = 1000
"""Of torchrun's own, which can't tell a user's mistake from what a restart mends."""


class Lost(Exception):
    """The job did not do what it was waited for."""


class Missed(Exception):
    """The job was done before a fault could come."""


@dataclass(frozen=True)
class StepTaken:
    """One step that rank 0 told of."""

    step: int
    process: int
    time: float
    """Seconds of `time.time`."""


class Job:
    """A context in which a training job runs, and at whose end nothing of it is left."""

    def __init__(self, folder: Path, config: Path, ranks: int, overrides: Sequence[str]) -> None:
        """folder: for the plan, logs and marks."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config, self.ranks = folder, config, ranks
        self.overrides = list(overrides)
        self.plan = Plan(log=str(folder / "log.jsonl"), pace=str(folder / "pace"))
        self.set_pace(_PACE)
        self._launcher: subprocess.Popen[bytes] | None = None

    def set_pace(self, seconds: float = _PACE) -> None:
        """How long each step is followed by nothing."""
        partial = Path(f"{self.plan.pace}.partial")
        partial.write_text(str(seconds))
        partial.replace(self.plan.pace)

    def plant(self, **fields: Any) -> None:
        """Fields of the plan, for lives that begin from now on."""
        self.plan = replace(self.plan, **fields)

    def start(self) -> None:
        """Start the launcher."""
        plan = self.folder / "plan.json"
        self.plan.write(plan)
        own = ["-m", "uoe_parallel.soak.planted", str(plan)]
        self._launcher = self.launch(_RESTARTS, [*own, "--config", str(self.config)])

    def launch(
        self, restarts: int, program: Sequence[str], output: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """A launcher of this job's program or of another one."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        options = ["--nproc-per-node", str(self.ranks), "--max-restarts", str(restarts)]
        with (output or self.output).open("ab") as out:
            return subprocess.Popen(
                [*torchrun, *options, "--monitor-interval", "0.1", *program, *self.overrides],
                stdout=out,
                stderr=out,
                env=os.environ | _ENVIRONMENT,
            )

    @property
    def output(self) -> Path:
        """What all its lives have said."""
        return self.folder / "output"

    @property
    def is_done(self) -> bool:
        """Whether the run came to its last step."""
        return self._launcher is not None and self._launcher.poll() == 0

    def steps(self) -> list[StepTaken]:
        """All that were told of, in the order of time."""
        return [
            StepTaken(record["step"], record["process"], record["time"])
            for record in self._records()
            if "step" in record
        ]

    def process(self, rank: int) -> int:
        """The id of the one that is or was this rank last."""
        return [r["process"] for r in self._records() if r["rank"] == rank][-1]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send to a rank, if it is there."""
        with suppress(ProcessLookupError):
            os.kill(self.process(rank), number)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
        """Wait until it holds, with the launcher started again whenever it fails. Raises Lost."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Lost(f"{what}: not within {seconds:g} s; see {self.output}")
            assert self._launcher is not None
            if self._launcher.poll() not in (None, 0):
                self.start()
            time.sleep(_TICK)

    def end(self) -> None:
        """Kill the launcher and its ranks at once."""
        if self._launcher is None:
            return
        self._launcher.send_signal(signal.SIGSTOP)  # it starts no more of them
        ranks = _descendants(self._launcher.pid)
        for process in ranks:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._launcher.kill()
        self._launcher.wait()
        psutil.wait_procs(ranks, timeout=10)

    def terminate(self) -> None:
        """Ask the launcher to leave, and wait for it and its ranks. Raises Lost."""
        assert self._launcher is not None
        ranks = _descendants(self._launcher.pid)
        self._launcher.terminate()
        try:
            self._launcher.wait(90)
        except subprocess.TimeoutExpired:
            raise Lost("the launcher did not leave when asked") from None
        if psutil.wait_procs(ranks, timeout=10)[1]:
            raise Lost("ranks outlived their launcher")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _records(self) -> list[dict[str, Any]]:
        log = Path(self.plan.log)
        if not log.exists():
            return []
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole]


def _descendants(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []

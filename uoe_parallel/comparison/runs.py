"""Trainings in processes of their own, some at once, each only if it has not been done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from threading import Lock

from uoe_parallel.comparison.collect import outcome
from uoe_parallel.comparison.plan import Training
from uoe_parallel.config.load import load_config, save_config
from uoe_parallel.errors import UserError

PATIENCE = 60.0
"""Seconds that a run has for its checkpoint when it is asked to leave."""
THREADS = "OMP_NUM_THREADS"
SHOWN_CHARACTERS = 2000


class Runner:
    """Starts trainings, and ends those that are under way when it is left."""

    def __init__(self, command: Sequence[str], jobs: int, say: Callable[[str], None]) -> None:
        """command: what takes --config, as in `ComparisonConfig.launch`. jobs: runs at once, which
        share the cores unless OMP_NUM_THREADS says how many threads each has."""
        self._command = [sys.executable if word == "python" else word for word in command]
        self._jobs = jobs
        self._say = say
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self._environment = {THREADS: str(threads), **os.environ}
        self._lock = Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_over = False

    def one_by_one(self) -> Runner:
        """One that trains nothing at once, as what is timed must."""
        return Runner(self._command, 1, self._say)

    def run(self, trainings: Sequence[Training]) -> None:
        """Train those that are left of these. Raises UserError for one that fails, after the others
        that were under way have been asked to leave: the same call goes on from there."""
        left = [training for training in trainings if outcome(training) is None]
        for training in left:
            _check_folder(training)
        done = len(trainings) - len(left)
        if done:
            self._say(f"{done} of {len(trainings)} runs are done already")
        with ThreadPoolExecutor(self._jobs) as pool:
            waiting = {pool.submit(self._train, training): training for training in left}
            try:
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        future.result()
                        done += 1
                        training = waiting.pop(future)
                        found = outcome(training)
                        assert found is not None
                        self._say(f"{done}/{len(trainings)} {training}: loss {found.loss:.4f}")
            except BaseException:
                self._leave()
                raise

    def _train(self, training: Training) -> None:
        folder = training.folder
        folder.mkdir(parents=True, exist_ok=True)
        config, log = folder / "given.yaml", folder / "output.log"
        save_config(training.config, config)
        with log.open("ab") as output:
            with self._lock:
                if self._is_over:
                    return
                # In a group of its own: Ctrl-C reaches this program, which asks it to leave.
                process = subprocess.Popen(
                    [*self._command, "--config", str(config)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if outcome(training) is None and not self._is_over:
            end = log.read_text(errors="replace")[-SHOWN_CHARACTERS:]
            raise UserError(
                f"{training}: ended with exit code {code} before its last step. {log} ends with:\n"
                f"{end}\nThe same command goes on with what is left"
            )

    def _leave(self) -> None:
        """Start nothing any more, and ask what runs to save and leave."""
        with self._lock:
            self._is_over = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _check_folder(training: Training) -> None:
    """Raises UserError if something else was trained there."""
    path = training.folder / "config.yaml"
    if path.exists() and load_config(path) != training.config:
        raise UserError(
            f"{training.folder} has a run with another config; give the comparison another folder "
            "or remove what is there"
        )

"""One soak: runs that get hurt, round after round, until the time is over."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from uoe_parallel.soak.curves import Curve, deviation, read_curve
from uoe_parallel.soak.injections import Injector, Outcome
from uoe_parallel.soak.job import Job, Lost, Missed
from uoe_parallel.soak.schedule import Fault, Reference, Round, nan_step, rounds
from uoe_parallel.soak.settings import (
    EVERY,
    RESHARDED_TOLERANCE,
    STEPS,
    overrides,
    write_config,
)

_DISK_BYTES = 2**28
"""Of the file system that gets full."""


@dataclass(frozen=True)
class RoundReport:
    """How a run with faults ended."""

    number: int
    planned: Round
    outcomes: tuple[Outcome, ...]
    problem: str
    """Of the run as a whole, empty if nothing was lost."""
    largest_deviation: float
    """Of a loss from the reference's, relative."""

    @property
    def nothing_lost(self) -> bool:
        return not self.problem and not any(outcome.problem for outcome in self.outcomes)


class Session:
    """Plays rounds in a folder."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        ranks: int,
        disk: Path | None,
        say: Callable[[str], None],
    ) -> None:
        """disk: as `small_disk` yields it."""
        self._folder = folder
        self._config = config
        self._ranks = ranks
        self._disk = disk
        self._say = say
        self._curves: dict[Reference, Curve] = {}

    def play(self, number: int, planned: Round, deadline: float) -> RoundReport:
        """One run from its first step to its last. No fault comes after `deadline`
        (`time.monotonic`)."""
        reference = self._reference(planned.reference)
        run_dir = (self._disk or self._folder) / f"run-{number}"
        own = overrides(planned.reference, run_dir, asynchronous=planned.asynchronous)
        job = Job(self._folder / f"round-{number}", self._config, self._ranks, own)
        injector = Injector(job, run_dir, self._disk, nan_step(STEPS))
        injector.plant(planned.injections)
        outcomes: list[Outcome] = []
        problem = ""
        with job:
            try:
                for injection in planned.injections:
                    if time.monotonic() > deadline:
                        break
                    self._say(f"round {number}, step {injection.step}: {injection.fault}")
                    try:
                        outcomes.append(injector.inject(injection))
                    except Missed:
                        break
                job.set_pace(0.0)
                job.wait_for(lambda: job.is_done, "the run did not come to its end")
            except Lost as lost:
                problem = str(lost)
                if len(outcomes) < len(planned.injections):
                    fault = planned.injections[len(outcomes)].fault
                    outcomes.append(Outcome(fault, 0, 0, 0.0, problem))
        largest = 0.0
        if not problem:
            tolerance = RESHARDED_TOLERANCE if planned.is_resharded else 0.0
            found = deviation(read_curve(run_dir), reference, tolerance)
            problem, largest = found.first, found.largest
            shutil.rmtree(run_dir)
        checked = tuple(self._checked(outcome, planned) for outcome in outcomes)
        return RoundReport(number, planned, checked, problem, largest)

    def _checked(self, outcome: Outcome, planned: Round) -> Outcome:
        """With a problem if it cost more steps than it may."""
        # A damaged checkpoint costs those of the one before too, and so does one that was being
        # written beside training; a roll-back takes other data.
        lost = 1 + (outcome.fault.name in ("TRUNCATED", "FLIPPED", "MISSING"))
        most = EVERY * (lost + planned.asynchronous)
        if outcome.problem or outcome.repeated <= most:
            return outcome
        return replace(outcome, problem=f"{outcome.repeated} steps repeated, not up to {most}")

    def _reference(self, kind: Reference) -> Curve:
        if kind not in self._curves:
            self._say(f"the run without faults ({kind})")
            run_dir = self._folder / f"run-{kind}"
            job = Job(self._folder / kind, self._config, self._ranks, overrides(kind, run_dir))
            job.set_pace(0.0)
            if kind != "plain":
                job.plant(nan_batch=nan_step(STEPS))
            with job:
                job.wait_for(lambda: job.is_done, "the run without faults did not end")
            self._curves[kind] = read_curve(run_dir)
        return self._curves[kind]


def soak(
    folder: Path,
    own_config: Path | None,
    *,
    seconds: float,
    most_rounds: int | None,
    seed: int,
    ranks: int,
    faults: Collection[Fault],
    say: Callable[[str], None],
) -> list[RoundReport]:
    """Rounds until `seconds` are over, at least one. Raises UserError for a config that can't be,
    Lost if a run does not even end without faults."""
    deadline = time.monotonic() + seconds
    config = write_config(folder, own_config)
    reports: list[RoundReport] = []
    with small_disk(folder / "disk") as disk:
        if disk is None and Fault.FULL_DISK in faults:
            say("no full disk: a small file system cannot be mounted here")
        possible = [fault for fault in faults if disk or fault is not Fault.FULL_DISK]
        session = Session(folder, config, ranks, disk, say)
        plan = rounds(seed, ranks=ranks, steps=STEPS, every=EVERY, faults=possible)
        for number, planned in enumerate(islice(plan, most_rounds), 1):
            reports.append(session.play(number, planned, deadline))
            if time.monotonic() > deadline:
                break
    return reports


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own at `folder`; None where nobody may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "soak", str(folder)]
    is_root = os.geteuid() == 0 and shutil.which("mount") is not None
    if not is_root or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

"""Doing a fault to a job, and waiting until it trains again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from uoe_parallel.checkpoint.folders import list_checkpoints
from uoe_parallel.soak.job import Job, Lost, Missed, StepTaken
from uoe_parallel.soak.plan import Place
from uoe_parallel.soak.schedule import DAMAGE, Fault, Injection
from uoe_parallel.soak.settings import WAIT_LIMIT

_SLOW = 0.8 * WAIT_LIMIT
"""Seconds between steps of a job that another one is started beside. Some ranks may hear of it a
step later."""
_FROM_INSIDE = {
    Fault.KILL_IN_SAVE: "kill_in_save",
    Fault.WEIGHT: "flip",
}
"""Faults that ranks do to themselves when they are told to, and their fields of the plan."""
_NANS = (Fault.SKIPPED_NAN, Fault.ROLLED_BACK_NAN)
_NO_PROCESS_ENDS = (Fault.SECOND_JOB, Fault.WEIGHT, *_NANS)


@dataclass(frozen=True)
class Outcome:
    """What came of a fault."""

    fault: Fault
    step: int
    """The last one before it."""
    repeated: int
    """Steps that were taken again."""
    seconds: float
    """Until ranks that were started after it took a step; of a fault by which no process ends,
    until steps were taken that had not been before."""
    problem: str = ""
    """Empty if the job survived it."""


class Injector:
    """Does faults to a job, one after the other."""

    def __init__(self, job: Job, run_dir: Path, disk: Path | None, nan_batch: int) -> None:
        """disk: the root of the file system of run_dir, if it may be filled."""
        self._job = job
        self._run_dir = run_dir
        self._disk = disk
        self._nan_batch = nan_batch
        self._acts: dict[Fault, Callable[[Injection], None]] = {
            Fault.KILL: lambda fault: job.signal(fault.rank, signal.SIGKILL),
            Fault.STOP: lambda fault: job.signal(fault.rank, signal.SIGSTOP),
            Fault.USR1: lambda fault: job.signal(fault.rank, signal.SIGUSR1),
            Fault.TERM: lambda _: job.terminate(),
            Fault.RESHARDED: self._reshard,
            Fault.SECOND_JOB: self._start_another,
            Fault.FULL_DISK: self._fill,
            **dict.fromkeys(DAMAGE, self._damage),
            **dict.fromkeys(_FROM_INSIDE, self._arm),
        }

    def plant(self, injections: Sequence[Injection]) -> None:
        """Have the job's ranks know, before it starts, what they are to do to themselves."""
        for injection in injections:
            fault, mark = injection.fault, str(self._mark(injection.fault))
            if fault in _FROM_INSIDE:
                armed = str(self._armed(fault))
                place = Place(injection.rank, injection.call, armed, mark)
                self._job.plant(**{_FROM_INSIDE[fault]: place})
            elif fault in _NANS:
                self._job.plant(nan_batch=self._nan_batch, nan_mark=mark)

    def inject(self, injection: Injection) -> Outcome:
        """Raises Lost if the job does not get further after it, Missed if it is done before."""
        job, fault = self._job, injection.fault
        if fault in _NANS:
            self._wait_for(self._mark(fault).exists, f"no step was reached for: {fault}")
            began = 0.0
        else:
            self._wait_for(
                lambda: bool(job.steps()) and job.steps()[-1].step >= injection.step,
                f"step {injection.step} was not reached for: {fault}",
            )
            time.sleep(injection.delay)
            if job.is_done:
                raise Missed
            began = time.time()
            self._acts[fault](injection)
        if fault in (*_NANS, *_FROM_INSIDE):
            began = self._mark(fault).stat().st_mtime
        return self._recovery(fault, began)

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Raises Missed if the job is done before."""
        self._job.wait_for(lambda: condition() or self._job.is_done, what)
        if not condition():
            raise Missed

    def _recovery(self, fault: Fault, began: float) -> Outcome:
        """Wait until the job has taken a step that it had not taken before, or is done."""

        def split() -> tuple[list[StepTaken], list[StepTaken]]:
            """Steps from before and after it."""
            taken = self._job.steps()
            victim = next((s.process for s in reversed(taken) if s.time <= began), None)
            later = [
                place
                for place, step in enumerate(taken)
                if step.time > began and (fault in _NO_PROCESS_ENDS or step.process != victim)
            ]
            place = later[0] if later else len(taken)
            return taken[:place], taken[place:]

        # Ranks look at each other when a step is told already.
        slack = 1 if fault in _NO_PROCESS_ENDS else 0

        def has_recovered() -> bool:
            before, after = split()
            return any(step.step > _furthest(before) + slack for step in after)

        self._job.wait_for(lambda: has_recovered() or self._job.is_done, f"no recovery of: {fault}")
        before, after = split()
        new = {step.step for step in after} - {step.step for step in before}
        repeated = len(after) - len(new)
        if fault in _NO_PROCESS_ENDS:
            after = [step for step in after if step.step > _furthest(before) + slack]
        again = after[0].time if after else time.time()
        return Outcome(fault, _furthest(before), repeated, again - began)

    def _mark(self, fault: Fault) -> Path:
        return self._job.folder / f"{fault.name}.mark"

    def _armed(self, fault: Fault) -> Path:
        return self._job.folder / f"{fault.name}.armed"

    def _arm(self, injection: Injection) -> None:
        fault = injection.fault
        if fault is Fault.WEIGHT:  # which is repaired from a checkpoint
            root = self._run_dir / "checkpoints"
            self._wait_for(lambda: bool(list_checkpoints(root)), "no checkpoint")
        self._armed(fault).touch()
        self._wait_for(self._mark(fault).exists, f"did not come: {fault}")

    def _damage(self, injection: Injection) -> None:
        """To the newest of several checkpoints, between two lives."""
        root = self._run_dir / "checkpoints"
        self._job.wait_for(lambda: len(list_checkpoints(root)) > 1, "no second checkpoint")
        self._job.end()
        shards = sorted(list_checkpoints(root)[0].glob("*.safetensors"))
        shard = shards[injection.rank % len(shards)]
        content = bytearray(shard.read_bytes())
        if injection.fault is Fault.MISSING:
            shard.unlink()
        elif injection.fault is Fault.TRUNCATED:
            shard.write_bytes(content[: len(content) // 2])
        else:
            content[-len(content) // 4] ^= 1
            shard.write_bytes(content)

    def _reshard(self, injection: Injection) -> None:
        self._job.terminate()
        wide = f"parallel.tensor={self._job.ranks}"
        kept = [override for override in self._job.overrides if override != wide]
        flat = len(kept) < len(self._job.overrides)
        self._job.overrides = kept if flat else [*kept, wide]

    def _start_another(self, injection: Injection) -> None:
        """Which has to leave by itself, with a message, while the first goes on."""
        job = self._job
        job.set_pace(_SLOW)
        holder, output = job.process(0), job.folder / "second"
        program = ["-m", "uoe_parallel.pretrain", "--config", str(job.config)]
        second = job.launch(0, program, output)
        try:
            second.wait(120)
        except subprocess.TimeoutExpired:
            raise Lost(f"the second job went on; see {output}") from None
        finally:
            second.kill()
            job.set_pace()
        said = output.read_text(errors="replace")
        if not re.search(r"exitcode\s*: 2\b", said) or "run_dir=" not in said:
            raise Lost(f"the second job was not refused; see {output}")
        if job.process(0) != holder:
            raise Lost(f"the second job ended the first; see {job.output}")

    def _fill(self, injection: Injection) -> None:
        """Until a rank has ended by it."""
        assert self._disk is not None
        holder, filler = self._job.process(0), self._disk / "filler"
        try:
            _write_until_full(filler)
            self._wait_for(lambda: not _lives(holder), "nobody minded a full disk")
            if self._job.is_done:
                raise Missed
        finally:
            filler.unlink(missing_ok=True)


def _furthest(steps: Sequence[StepTaken]) -> int:
    return max((step.step for step in steps), default=0)


def _write_until_full(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        # At once, for the job goes on; and what it freed meanwhile.
        with suppress(OSError):
            os.posix_fallocate(out.fileno(), 0, shutil.disk_usage(file.parent).free)
        out.seek(0, os.SEEK_END)
        with suppress(OSError):
            while out.write(bytes(4096)):
                pass


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""One verification: which layouts run, one after the other, and what their numbers come to."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from uoe_parallel.config.json_text import write_json
from uoe_parallel.config.schema import Precision, RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.verification.compare import compare
from uoe_parallel.verification.layouts import Candidate, Selection, candidates, reasons, select
from uoe_parallel.verification.ranks import Failure, LocalRanks
from uoe_parallel.verification.record import RunRecord
from uoe_parallel.verification.report import Report, Row
from uoe_parallel.verification.request import FaultRequest, PlantedFault, Request
from uoe_parallel.verification.settings import changes, comparable, shrunken, with_routes

REFERENCE: dict[Precision, str] = {"fp32": "one-zero0", "fp64": "one-zero0", "bf16": "one-zero1"}
"""One rank. In bf16 without ZeRO, DeepSpeed would add up gradients in bf16."""
LIBRARIES = ("torch", "megatron-core", "deepspeed")


class ReferenceFailedError(Exception):
    """There is nothing to compare with."""


@dataclass(frozen=True)
class Plan:
    """What runs."""

    config: RunConfig
    reference: Candidate
    selection: Selection
    shrunk: list[str]
    """Fields that were made smaller, in words."""
    changed: list[str]
    """Fields of the model that a comparison needs otherwise."""


def plan(request: Request) -> Plan:
    """Raises UserError for what can't be run."""
    whole = comparable(request.config, steps=request.steps, precision=request.precision)
    changed = [line for line in changes(request.config, whole) if line.startswith("model.")]
    reference, selection = _choose(whole, request)
    if not request.shrink:
        return Plan(whole, reference, selection, [], changed)
    stages = max(candidate.layout.pipeline for candidate in selection.runs)
    small = shrunken(whole, ranks=request.ranks, stages=stages)
    return Plan(small, *_choose(small, request), changes(whole, small), changed)


def _choose(config: RunConfig, request: Request) -> tuple[Candidate, Selection]:
    found = candidates(config, request.ranks)
    name = REFERENCE[request.precision]
    reference = next(candidate for candidate in found if candidate.name == name)
    if reference.fault is not None:
        raise UserError(f"{name}, the reference, can't run: {reference.fault}")
    gpus = torch.cuda.device_count()
    if 0 < gpus < request.ranks:
        raise UserError(
            f"--ranks {request.ranks} is more than the {gpus} GPUs of this machine; use at most "
            f"{gpus}, or hide them to run on the CPU: CUDA_VISIBLE_DEVICES="
        )
    return reference, select(found, request.patterns)


def verify(request: Request) -> bool:
    """Run, compare and report everything; whether all of it passed.

    Raises UserError, and ReferenceFailedError where that is no mistake of the user's.
    """
    started = time.monotonic()
    ranks = LocalRanks()
    planned = plan(request)
    runs = planned.selection.runs
    names = [candidate.name for candidate in runs]
    report = Report(names, request.tolerances, plants=request.fault is not None)
    _introduce(report, request, planned)
    with _folder(request.keep) as folder:
        runner = _Runner(request, ranks, folder)
        write_json(request.results, _results(request, planned, report, started))
        with report.doing("starting"):
            ranks.wait_until_ready()
        with report.doing(f"{planned.reference.name}, the reference"):
            reference, seconds = runner.reference(planned.reference)
        report.head()
        report.reference(planned.reference.name, seconds)
        for number, candidate in enumerate(runs, start=1):
            with report.doing(f"[{number}/{len(runs)}] {candidate.name}"):
                row = runner.verify(candidate, reference)
            report.add(row)
            # Every time, for what is interrupted later.
            write_json(request.results, _results(request, planned, report, started))
    report.left_out(reasons(planned.selection.left_out))
    report.conclude(time.monotonic() - started, request.results)
    return report.passed


class _Runner:
    """Runs layouts in folders of their own below `folder`."""

    def __init__(self, request: Request, ranks: LocalRanks, folder: Path) -> None:
        self._request = request
        self._ranks = ranks
        self._folder = folder

    def reference(self, candidate: Candidate) -> tuple[RunRecord, float]:
        folder = self._folder / "reference"
        outcome, seconds = self._train(candidate, folder, "record", None)
        if isinstance(outcome, Failure):
            if outcome.mistake is not None:
                raise UserError(outcome.mistake)
            raise ReferenceFailedError(
                f"{candidate.name}, the reference, failed: {outcome.summary}\n{outcome.details}"
            )
        return RunRecord.open(folder), seconds

    def verify(self, candidate: Candidate, reference: RunRecord) -> Row:
        folder = self._folder / candidate.name
        outcome, seconds = self._train(candidate, folder, self._request.routes, self._request.fault)
        micro = candidate.config.training.micro_batch_size
        if isinstance(outcome, Failure):
            return Row(candidate.name, outcome, seconds=seconds, micro_batch_size=micro)
        record = RunRecord.open(folder)
        comparison = compare(reference, record, self._request.eps)
        if self._request.keep is None:
            shutil.rmtree(folder)
        return Row(
            candidate.name,
            comparison,
            list(comparison.beyond(self._request.tolerances)),
            record.routes(),
            seconds,
            micro,
            outcome,
        )

    def _train(
        self, candidate: Candidate, folder: Path, routes: str, fault: FaultRequest | None
    ) -> tuple[PlantedFault | Failure | None, float]:
        started = time.monotonic()
        config = candidate.config.model_copy(update={"run_dir": str(folder)})
        outcome = self._ranks.run(
            candidate.layout.world_size,
            "uoe_parallel.verification.worker:train",
            with_routes(config, routes, self._folder / "routes"),
            fault,
            self._request.timeout,
            logs=folder / "logs",
            timeout=self._request.timeout,
        )
        return outcome, time.monotonic() - started


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where run folders go: a temporary place, or `keep`, which must be new."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="verify-layouts-") as name:
            yield Path(name)
        return
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--keep: {keep}: {error.strerror}; name a new folder") from None
    yield keep.resolve()


def _introduce(report: Report, request: Request, planned: Plan) -> None:
    training = planned.config.training
    report.say(
        f"{request.config_path}: {len(planned.selection.runs)} layouts of up to {request.ranks} "
        f"ranks against {planned.reference.name}, {training.steps} steps of "
        f"{training.global_batch_size} x {planned.config.model.sequence_length} tokens, "
        f"{training.precision}"
    )
    for title, lines in (("shrunk", planned.shrunk), ("changed", planned.changed)):
        if lines:
            report.say(f"{title}: {', '.join(lines)}")
    if request.fault:
        report.say(f"planted fault: {request.fault.kind}, seed {request.fault.seed}")
    report.say("")


def _results(request: Request, planned: Plan, report: Report, started: float) -> dict[str, Any]:
    finished = len(report.rows) == len(planned.selection.runs)
    return {
        "config": str(request.config_path),
        "precision": request.precision,
        "steps": request.steps,
        "shrunk": planned.shrunk,
        "changed": planned.changed,
        "versions": {name: version(name) for name in LIBRARIES},
        "fault": asdict(request.fault) if request.fault else None,
        "reference": planned.reference.name,
        "eps": request.eps,
        "tolerances": asdict(request.tolerances),
        "seconds": time.monotonic() - started,
        "finished": finished,
        "passed": finished and report.passed,
        "layouts": [row.to_json() for row in report.rows],
        "left_out": [
            {"layouts": names, "reason": reason}
            for reason, names in reasons(planned.selection.left_out).items()
        ],
    }

"""From what runs have recorded to results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from uoe_parallel.comparison.contenders import Model
from uoe_parallel.comparison.plan import Training
from uoe_parallel.comparison.results import Point, Result, Run
from uoe_parallel.config.load import load_config
from uoe_parallel.errors import UserError
from uoe_parallel.training.metrics import read_metrics

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a training that is over has recorded."""

    reports: list[Record]
    """Of training."""
    validations: list[Record]
    test: Record | None
    """None if the loss stopped being a number before the last step."""

    @property
    def loss(self) -> float:
        """Of the last validation, nats per label that counts; infinite without a last step."""
        return math.inf if self.test is None else self.validations[-1]["loss"]


def outcome(training: Training) -> Outcome | None:
    """Of a training that is over; None of one that is not, or not of this config."""
    folder = training.folder
    try:
        config = load_config(folder / "config.yaml")
        records = read_metrics(folder / "metrics.jsonl")
    except (UserError, OSError):
        return None
    if config != training.config:
        return None
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "validation")}
    tests = [r for r in records if r["kind"] == "test" and r["step"] == config.training.steps]
    # Replicas that part stop a run too, and say nothing about the model.
    stops = [r for r in records if r["kind"] == "event" and r["done"] == "stop"]
    diverged = any("gradient_norm" in stop for stop in stops)
    if not tests and not diverged:
        return None
    return Outcome(kinds["train"], kinds["validation"], tests[0] if tests else None)


def seconds_per_step(reports: Sequence[Record]) -> float:
    """The median over reports but the first, which has what only starting takes; NaN of none."""
    return median([report["seconds/step"] for report in reports[1:] or reports] or [math.nan])


def best_learning_rate(losses: dict[float, float]) -> float:
    """That of the lowest loss, the lowest of equals."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def result(
    model: Model,
    sweep: Sequence[tuple[Training, Outcome]],
    compared: Sequence[tuple[Training, Outcome]],
) -> Result:
    """Of a contender, whose trainings and their outcomes these are."""
    losses = {t.config.training.learning_rate: o.loss for t, o in sweep}
    first = compared[0][0].config
    tokens = _tokens_per_step(model)
    return Result(
        name=model.name,
        about=model.about,
        parameters=model.parameters.total,
        active_parameters=model.parameters.active,
        flops_per_token=model.flops_per_token,
        steps=first.training.steps,
        tokens=first.training.steps * tokens,
        learning_rate=first.training.learning_rate,
        sweep=losses,
        sweep_flops=sum(t.config.training.steps for t, _ in sweep) * tokens * model.flops_per_token,
        runs=[_run(model, training, found) for training, found in compared],
    )


def _tokens_per_step(model: Model) -> int:
    return model.config.training.global_batch_size * model.config.model.sequence_length


def _run(model: Model, training: Training, found: Outcome) -> Run:
    tokens = _tokens_per_step(model)
    curve = [
        Point(v["step"], v["step"] * tokens, v["step"] * tokens * model.flops_per_token, v["loss"])
        for v in found.validations
    ]
    last_half = found.reports[len(found.reports) // 2 :]
    test = found.test or {"loss": math.inf, "accuracy": math.nan}
    kinds = {name.rpartition(".")[2] for name in training.config.routed_blocks}
    return Run(
        seed=training.config.seed,
        curve=curve,
        loss=test["loss"],
        accuracy=test["accuracy"],
        bits_per_byte=test.get("bits_per_byte"),
        seconds_per_step=seconds_per_step(found.reports),
        peak_memory=round(max((r["peak_memory_bytes"] for r in found.reports), default=0)),
        load_max_over_mean=_mean(last_half, "load_max_over_mean/layers."),
        load_entropy=_mean(last_half, "load_entropy/layers."),
        experts_per_token={
            kind: mean
            for kind in sorted(kinds)
            if (mean := _mean(last_half, "experts_per_token/layers.", f".{kind}")) is not None
        },
        dropped_share=_mean(last_half, "dropped_share/layers."),
    )


def _mean(reports: Sequence[Record], start: str, end: str = "") -> float | None:
    """Over reports and blocks, of what is named so; None if nothing is."""
    values = [
        value
        for report in reports
        for name, value in report.items()
        if name.startswith(start) and name.endswith(end) and value is not None
    ]
    return fmean(values) if values else None

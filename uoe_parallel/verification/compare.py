"""How far the numbers of a run are from those of another, and which differs first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from uoe_parallel.config.faults import show
from uoe_parallel.config.schema import Precision
from uoe_parallel.errors import UserError
from uoe_parallel.verification.record import RunRecord
from uoe_parallel.verification.request import Tolerances

QUANTITIES = ("loss", "gradient_norm", "gradients", "weights")
INITIAL_WEIGHTS = "initial_weights"

_FREE: Any = {
    **dict.fromkeys(("run_dir", "parallel", "checkpoint", "logging", "routes", "deepspeed"), True),
    "data": {"train", "validation", "test"},
    "training": {"micro_batch_size", "validate_every", "validation_sequences"},
}
"""What two runs that are compared may have different. (A corpus is known by its tokens.)"""
EPS = 1e-3
"""A tensor whose norm is below this share of the norm of all tensors is judged by that instead."""


DEFAULTS: dict[Precision, Tolerances] = {
    "fp32": Tolerances(loss=5e-6, gradient_norm=1e-5, gradients=2e-4, weights=5e-3),
    "fp64": Tolerances(loss=1e-13, gradient_norm=1e-13, gradients=1e-11, weights=1e-10),
    "bf16": Tolerances(loss=5e-3, gradient_norm=5e-2, gradients=0.3, weights=0.6),
}


@dataclass(frozen=True)
class Difference:
    """One number of one step, and how far it is from the reference's."""

    step: int
    """0 is before the first."""
    quantity: str
    """One of QUANTITIES, or INITIAL_WEIGHTS."""
    parameter: str | None
    value: float


@dataclass(frozen=True)
class Beyond:
    """The first difference of a quantity in a step that its tolerance does not allow."""

    difference: Difference
    tolerance: float
    count: int
    """Of numbers beyond it in this step: parameters, or 1."""
    of: int


@dataclass(frozen=True)
class StepDifferences:
    """After one optimizer step. Parameters come in order of depth."""

    step: int
    loss: float
    gradient_norm: float
    gradients: dict[str, float]
    """Empty where the checkpoint before the step's is missing."""
    weights: dict[str, float]

    def of(self, quantity: str) -> dict[str | None, float]:
        found = getattr(self, quantity)
        return {**found} if isinstance(found, dict) else {None: found}


@dataclass(frozen=True)
class Comparison:
    """Every difference is relative: |a - b| / max(own norm of b, eps x global norm of b), b being
    the reference's. Of a loss or a gradient norm the own norm is its size; of a gradient that of
    the parameter's gradient in that step, before clipping; of a weight that of its change since
    the first step, which is what training made of it."""

    initial: dict[str, float]
    """Of weights before the first step, over their own norms; empty if one run didn't keep them."""
    steps: list[StepDifferences]

    def worst(self, quantity: str) -> Difference:
        """The largest difference of all steps."""
        return max(
            (
                Difference(step.step, quantity, name, value)
                for step in self.steps
                for name, value in step.of(quantity).items()
            ),
            key=lambda difference: difference.value,
        )

    def beyond(self, tolerances: Tolerances) -> Iterator[Beyond]:
        """What is not within `tolerances`, in the order in which a run computes: step by step, and
        in a step the loss, gradients from the last layer to the first, their norm, and weights."""
        for step, quantity, found, tolerance in self._in_order(tolerances):
            beyond = {name: value for name, value in found.items() if not value <= tolerance}
            if beyond:
                name, value = next(iter(beyond.items()))
                difference = Difference(step, quantity, name, value)
                yield Beyond(difference, tolerance, len(beyond), len(found))

    def _in_order(
        self, tolerances: Tolerances
    ) -> Iterator[tuple[int, str, dict[str | None, float], float]]:
        # Both runs draw the same full weights, so these are the same bits.
        yield 0, INITIAL_WEIGHTS, {**self.initial}, 0.0
        for step in self.steps:
            for quantity in ("loss", "gradients", "gradient_norm", "weights"):
                # Backward, a wrong gradient spoils those of the layers before it.
                found = dict(reversed(step.of(quantity).items()))
                yield step.step, quantity, found, getattr(tolerances, quantity)


def compare(reference: RunRecord, run: RunRecord, eps: float) -> Comparison:
    """Raises UserError if the two can't be compared: other parameters, no steps in common."""
    steps = _common_steps(reference, run)
    both_began = reference.initial is not None and run.initial is not None
    base = 0 if both_began else steps[0]
    initial = _Norms()
    gradients: dict[int, _Norms] = {step: _Norms() for step in steps}
    weights: dict[int, _Norms] = {step: _Norms() for step in steps}
    for name in reference.parameters:
        start = reference.weight(base, name)
        if both_began:
            initial.add(name, run.weight(0, name) - start, start)
        for step in steps:
            if reference.has_gradients(step) and run.has_gradients(step):
                gradient = reference.gradient(step, name)
                gradients[step].add(name, run.gradient(step, name) - gradient, gradient)
            weight = reference.weight(step, name)
            own = weight - start if step > base else weight
            weights[step].add(name, run.weight(step, name) - weight, own)
    return Comparison(
        initial.relative(eps=0.0),
        [
            StepDifferences(
                step,
                *_reported(reference.reports[step], run.reports[step]),
                gradients[step].relative(eps),
                weights[step].relative(eps),
            )
            for step in steps
        ],
    )


class _Norms:
    """Of one tensor per parameter: how far it is from the reference's, and how large that is."""

    def __init__(self) -> None:
        self._norms: dict[str, tuple[float, float]] = {}

    def add(self, name: str, difference: Tensor, own: Tensor) -> None:
        self._norms[name] = float(difference.norm()), float(own.norm())

    def relative(self, eps: float) -> dict[str, float]:
        floor = eps * math.hypot(*(own for _, own in self._norms.values()))
        return {
            name: _ratio(difference, max(own, floor))
            for name, (difference, own) in self._norms.items()
        }


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    # What is not a number is as far away as can be.
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def _reported(reference: Mapping[str, float], report: Mapping[str, float]) -> tuple[float, float]:
    """Relative differences of loss and gradient norm."""
    loss, norm = (
        _ratio(abs(report[value] - reference[value]), abs(reference[value]))
        for value in ("loss", "gradient_norm")
    )
    return loss, norm


def _common_steps(reference: RunRecord, run: RunRecord) -> list[int]:
    for first, other in ((reference, run), (run, reference)):
        if missing := [n for n in first.parameters if n not in other.parameters]:
            raise UserError(f"{other.folder} has no {missing[0]}, which {first.folder} has")
    steps = sorted(reference.checkpoints.keys() & run.checkpoints.keys())
    if not any(reference.has_gradients(step) and run.has_gradients(step) for step in steps):
        kept = " and ".join(f"{r.folder}: {sorted(r.checkpoints)}" for r in (reference, run))
        raise UserError(
            "gradients are read from the checkpoints of two steps in a row, or of step 1, which "
            f"these runs don't both have (steps of {kept}). Run both with checkpoint.every=1 and "
            "checkpoint.keep= the number of steps"
        )
    for record in (reference, run):
        for step in steps:
            if step not in record.reports:
                raise UserError(
                    f"{record.folder / 'metrics.jsonl'} has no record of training step {step}; "
                    "run with logging.every=1"
                )
    return steps


def differing_fields(reference: RunRecord, run: RunRecord) -> list[str]:
    """What keeps two runs from training the same model in the same way, in words."""
    ours, theirs = (_fixed(record) for record in (reference, run))
    told = [
        f"{name}: {show(value)} and {show(theirs.get(name))}"
        for name, value in ours.items()
        if value != theirs.get(name)
    ]
    for record in (reference, run):
        told += [
            f"model.{name} of {record.folder} is {value}: layouts are compared without dropout"
            for name, value in record.config.model
            if name.endswith("dropout") and value
        ]
    return told


def _fixed(record: RunRecord) -> dict[str, object]:
    """Every field that makes numbers what they are."""
    data = record.identity or {}
    fields = {name: value for name, value in data.items() if name.startswith("tokens of")}
    sections = record.config.model_dump(mode="json", exclude=_FREE)
    for section, values in sections.items():
        inner = values if isinstance(values, dict) else {"": values}
        fields |= {f"{section}.{name}".strip("."): value for name, value in inner.items()}
    return fields

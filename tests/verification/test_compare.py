"""Differences are measured as they are defined, and the first one is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.verification.cases import Step, write_record
from uoe_parallel.errors import UserError
from uoe_parallel.verification.compare import (
    QUANTITIES,
    Comparison,
    compare,
    differing_fields,
)
from uoe_parallel.verification.record import RunRecord
from uoe_parallel.verification.request import Tolerances

EPS = 1e-3
EMBEDDING, NORM, ROUTER, HEAD = NAMES = [
    "embedding.tokens.weight",
    "layers.0.attention_norm.weight",
    "layers.2.feed_forward.router_weight",
    "head.logits.weight",
]
TOLERANCES = Tolerances(loss=1e-6, gradient_norm=1e-6, gradients=1e-5, weights=1e-5)
SECTIONS: dict[str, Any] = {"training": {"gradient_clipping": 0.5}}


def _random(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, generator=generator) for name in NAMES}


def _moved(weights: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight + 0.1 * direction[name] for name, weight in weights.items()}


INITIAL = _random(0)
STEPS = [
    Step(4.0, 2.0, _random(1), _moved(INITIAL, _random(2))),
    Step(3.0, 0.2, _random(3), _moved(INITIAL, _random(4))),
]


def _open(folder: Path, steps: list[Step], initial: Any = INITIAL, **sections: Any) -> RunRecord:
    return RunRecord.open(write_record(folder, steps, initial, **SECTIONS | sections))


def _compare(tmp_path: Path, steps: list[Step], **given: Any) -> Comparison:
    """The plain steps with `steps`."""
    reference = _open(tmp_path / "reference", STEPS)
    return compare(reference, _open(tmp_path / "run", steps, **given), EPS)


def _with(step: Step, **changes: Any) -> Step:
    """`step` with a loss, a norm, or single tensors replaced."""
    for kind in ("gradients", "weights"):
        if kind in changes:
            changes[kind] = getattr(step, kind) | changes[kind]
    return replace(step, **changes)


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    comparison = _compare(tmp_path, STEPS)
    assert [step.step for step in comparison.steps] == [1, 2]
    assert comparison.initial == dict.fromkeys(NAMES, 0.0)
    for step in comparison.steps:
        assert list(step.gradients) == list(step.weights) == NAMES
    assert [comparison.worst(quantity).value for quantity in QUANTITIES] == [0.0] * 4
    assert list(comparison.beyond(Tolerances(0, 0, 0, 0))) == []


def test_differences_are_relative_to_the_reference(tmp_path: Path) -> None:
    first, second = STEPS
    off = torch.full((5,), 1e-3)
    comparison = _compare(
        tmp_path,
        [
            _with(first, loss=4.04, gradients={NORM: first.gradients[NORM] + off}),
            _with(second, norm=0.22, weights={HEAD: second.weights[HEAD] - off}),
        ],
    )
    one, two = comparison.steps
    size = float(off.norm())
    assert (one.loss, two.loss) == (pytest.approx(0.01), 0.0)
    assert (one.gradient_norm, two.gradient_norm) == (0.0, pytest.approx(0.1))
    assert one.gradients[NORM] == pytest.approx(size / float(first.gradients[NORM].norm()), 1e-4)
    assert two.gradients[NORM] < 1e-4, "a wrong gradient of one step is not wrong in the next"
    change = second.weights[HEAD] - INITIAL[HEAD]
    assert two.weights[HEAD] == pytest.approx(size / float(change.norm()), 1e-4)
    assert two.weights[ROUTER] == 0.0
    worst = comparison.worst("gradients")
    assert (worst.step, worst.parameter, worst.value) == (1, NORM, one.gradients[NORM])


def test_another_norm_makes_no_gradient_differ(tmp_path: Path) -> None:
    """Clipping by it is undone with the run's own norm."""
    comparison = _compare(tmp_path, [_with(STEPS[0], norm=4.0), STEPS[1]])
    assert comparison.steps[0].gradient_norm == 1.0
    assert max(comparison.steps[0].gradients.values()) < 1e-6
    [first, *_] = comparison.beyond(TOLERANCES)
    assert (first.difference.quantity, first.difference.parameter) == ("gradient_norm", None)


def test_small_tensors_are_measured_by_all_of_them(tmp_path: Path) -> None:
    tiny, off = torch.full((5,), 1e-9), torch.full((5,), 1e-9)
    steps = [_with(STEPS[0], gradients={NORM: tiny})]
    reference = _open(tmp_path / "reference", steps)
    run = _open(tmp_path / "run", [_with(STEPS[0], gradients={NORM: tiny + off})])
    norms = [float(steps[0].gradients[name].norm()) for name in NAMES]
    found = compare(reference, run, EPS).steps[0].gradients[NORM]
    assert found == pytest.approx(float(off.norm()) / (EPS * math.hypot(*norms)), 1e-3)
    assert compare(reference, run, 1e-12).steps[0].gradients[NORM] == pytest.approx(1.0, 1e-3)


def test_what_is_no_number_is_infinitely_far(tmp_path: Path) -> None:
    broken = {NORM: torch.full((5,), math.nan)}
    comparison = _compare(tmp_path, [_with(STEPS[0], gradients=broken), STEPS[1]])
    worst = comparison.worst("gradients")
    assert (worst.step, worst.parameter, worst.value) == (1, NORM, math.inf)
    assert next(comparison.beyond(TOLERANCES)).difference == worst


OFF = {EMBEDDING: torch.ones(5), ROUTER: torch.ones(5)}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"loss": 4.1, "gradients": OFF}, {}, (1, "loss", None, 1, 1)),
        ({"gradients": OFF, "weights": OFF}, {"loss": 4.1}, (1, "gradients", ROUTER, 2, 4)),
        ({"weights": OFF}, {"loss": 4.1}, (1, "weights", ROUTER, 2, 4)),
        ({"norm": 2.1, "weights": OFF}, {}, (1, "gradient_norm", None, 1, 1)),
        ({}, {"gradients": OFF, "norm": 0.3}, (2, "gradients", ROUTER, 2, 4)),
    ],
)
def test_the_first_is_named_in_the_order_of_computing(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    comparison = _compare(tmp_path, [_with(STEPS[0], **first), _with(STEPS[1], **second)])
    found = next(comparison.beyond(TOLERANCES))
    difference = found.difference
    told = (difference.step, difference.quantity, difference.parameter, found.count, found.of)
    assert told == expected


def test_initial_weights_have_to_be_the_same_bits(tmp_path: Path) -> None:
    moved = INITIAL | {NORM: INITIAL[NORM] * (1 + 1e-6)}
    comparison = _compare(tmp_path, STEPS, initial=moved)
    found = next(comparison.beyond(TOLERANCES)).difference
    assert (found.step, found.quantity, found.parameter) == (0, "initial_weights", NORM)


def test_without_initial_weights_changes_count_from_the_first_step(tmp_path: Path) -> None:
    off = torch.full((5,), 1e-3)
    steps = [_with(step, weights={HEAD: step.weights[HEAD] + off}) for step in STEPS]
    one, two = _compare(tmp_path, steps, initial=None).steps
    own, change = STEPS[0].weights[HEAD], STEPS[1].weights[HEAD] - STEPS[0].weights[HEAD]
    assert one.weights[HEAD] == pytest.approx(float(off.norm() / own.norm()), 1e-4)
    assert two.weights[HEAD] == pytest.approx(float(off.norm() / change.norm()), 1e-4)


def test_runs_without_common_gradients_are_refused(tmp_path: Path) -> None:
    reference, run = (_open(tmp_path / name, STEPS * 2) for name in ("reference", "run"))
    for record in (reference, run):
        del record.checkpoints[1]
    comparison = compare(reference, run, EPS)
    assert [bool(step.gradients) for step in comparison.steps] == [False, True, True]
    del run.checkpoints[3]
    with pytest.raises(UserError, match=r"two steps in a row.*checkpoint.every=1"):
        compare(reference, run, EPS)


def test_runs_without_reports_or_parameters_are_refused(tmp_path: Path) -> None:
    reference, run = (_open(tmp_path / name, STEPS) for name in ("reference", "run"))
    del run.reports[2]
    with pytest.raises(UserError, match=r"no record of training step 2; run with logging.every=1"):
        compare(reference, run, EPS)
    run.parameters.remove(ROUTER)
    with pytest.raises(UserError, match=f"run has no {ROUTER}"):
        compare(reference, run, EPS)


def test_fields_that_make_other_numbers_are_told(tmp_path: Path) -> None:
    reference = _open(tmp_path / "reference", STEPS)
    other_layout = {
        "run_dir": "elsewhere",
        "parallel": {"tensor": 2, "zero_stage": 3},
        "training": {**SECTIONS["training"], "micro_batch_size": 4},
        "checkpoint": {"every": 1},
    }
    assert differing_fields(reference, _open(tmp_path / "same", STEPS, **other_layout)) == []
    other_numbers = {
        "seed": 8,
        "model": {"init_std": 0.2},
        "training": {**SECTIONS["training"], "betas": (0.8, 0.9)},
    }
    told = differing_fields(reference, _open(tmp_path / "other", STEPS, **other_numbers))
    assert (
        told
        == [
            "seed: 7 and 8",
            "model.init_std: 0.1 and 0.2",
            "training.betas: [0.9, 0.95] and [0.8, 0.9]",
            "training.gradient_clipping: 0.5 and 0.5",
        ][:3]
    )

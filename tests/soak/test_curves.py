"""A curve that faults left a trace in is told from one without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uoe_parallel.soak.curves import deviation, read_curve

STEPS = [
    {"step": step, "kind": kind, "loss": 5.0 / step, "gradient_norm": 1.0, "learning_rate": 0.1}
    for step, kind in ((1, "train"), (2, "train"), (2, "validation"), (3, "train"))
]


def _curve(folder: Path, records: list[dict[str, Any]]) -> Any:
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return read_curve(folder)


def _changed(place: int, **fields: Any) -> list[dict[str, Any]]:
    return [step | (fields if i == place else {}) for i, step in enumerate(STEPS)]


def test_speed_and_events_are_no_part_of_a_curve(tmp_path: Path) -> None:
    timed = [step | {"tokens_per_second": 3.0} for step in STEPS]
    event = {"step": 2, "kind": "event", "event": "skipped"}
    reference = _curve(tmp_path, STEPS)
    assert len(reference) == 3 * 3 + 1
    found = deviation(_curve(tmp_path, [event, *timed]), reference, 0.0)
    assert (found.first, found.largest) == ("", 0.0)


def test_first_difference_is_told(tmp_path: Path) -> None:
    reference = _curve(tmp_path, STEPS)
    for records, told in (
        (_changed(1, loss=2.5000001), "train loss of step 2 is 2.5000001, and 2.5 without"),
        (_changed(2, loss=2.6), "validation loss of step 2 is 2.6, and 2.5 without"),
        (_changed(3, gradient_norm=2.0), "train gradient_norm of step 3 is 2.0, and 1.0 without"),
        (_changed(3, loss=None), "train loss of step 3 is None"),
        (STEPS[:-1], "train gradient_norm of step 3 is None, and 1.0 without"),
        ([*STEPS, STEPS[0]], "train again gradient_norm of step 1 is 1.0, and None without"),
    ):
        found = deviation(_curve(tmp_path, records), reference, 0.0)
        assert found.first.startswith(told)


def test_tolerance_is_of_losses_alone(tmp_path: Path) -> None:
    reference = _curve(tmp_path, STEPS)
    near = _changed(1, loss=2.5001, gradient_norm=1.1)
    found = deviation(_curve(tmp_path, near), reference, 1e-3)
    assert found.first == "" and 3e-5 < found.largest < 5e-5
    far = _curve(tmp_path, _changed(1, loss=2.6))
    assert deviation(far, reference, 1e-3).first.startswith("train loss of step 2")
    assert deviation(_curve(tmp_path, STEPS[1:]), reference, 1e-3).first

"""What a run's metrics say of its training, held against those of a run without faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_parallel.training.metrics import read_metrics

_NAMES = {
    "train": ("loss", "gradient_norm", "learning_rate"),
    "validation": ("loss",),
    "test": ("loss",),
}
"""Numbers of each kind of record that do not depend on how fast or how often a run went."""

Curve = Mapping[tuple[str, int, str], Any]
"""By kind, step and name."""


@dataclass(frozen=True)
class Deviation:
    """The first number that is beyond the tolerance, in words, and the largest difference of a
    loss, relative to the reference's."""

    first: str
    """Empty if there is none."""
    largest: float


def read_curve(run_dir: Path) -> Curve:
    """Of the run in `run_dir`. A step that was recorded twice counts as another one, which no
    reference has."""
    curve: dict[tuple[str, int, str], Any] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        for name in _NAMES.get(record["kind"], ()):
            key = (record["kind"], record["step"], name)
            while key in curve:
                key = (f"{key[0]} again", *key[1:])
            curve[key] = record.get(name)
    return curve


def deviation(curve: Curve, reference: Curve, tolerance: float) -> Deviation:
    """tolerance: of losses, relative. With 0 every number must be the same; with another only
    losses are compared."""
    first, largest = "", 0.0
    for key in sorted(curve.keys() | reference.keys(), key=lambda key: (key[1], key[0], key[2])):
        kind, step, name = key
        if tolerance > 0 and name != "loss":
            continue
        found, wanted = curve.get(key), reference.get(key)
        if found == wanted and (key in curve) == (key in reference):
            continue
        difference = float("inf")
        if found is not None and wanted is not None:
            difference = abs(found - wanted) / abs(wanted)
        largest = max(largest, difference if name == "loss" else 0.0)
        if not first and not difference <= tolerance:
            first = f"{kind} {name} of step {step} is {found}, and {wanted} without faults"
    return Deviation(first, largest)

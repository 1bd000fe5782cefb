"""What runs over several seeds say: spreads, paired differences, and points on their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy.stats import t as student_t

from uoe_parallel.comparison.results import Point

CONFIDENCE = 0.95

Axis = Literal["tokens", "flops"]
"""Fields of `Point` that curves are drawn and judged over."""


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds."""

    values: list[float]
    not_finite: int
    """How many of them are infinite or NaN. With any there is no mean: leaving them out would make
    a contender the better, the more of its runs diverge."""
    mean: float | None
    deviation: float | None
    """Standard deviation of the sample; None for one value."""
    smallest: float | None
    largest: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    not_finite = sum(not math.isfinite(value) for value in values)
    if not_finite:
        return Spread(list(values), not_finite, None, None, None, None)
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(list(values), 0, fmean(values), deviation, min(values), max(values))


@dataclass(frozen=True)
class Difference:
    """A contender minus a baseline, seed by seed."""

    values: list[float]
    """By seed, ascending."""
    mean: float | None
    """None where a value of either side is not finite."""
    interval: tuple[float, float] | None
    """Of `CONFIDENCE` for the mean, by Student's t of the differences; None for one seed."""
    p_value: float | None
    """Two-sided, of no difference; None for one seed."""

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval lies to one side of zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(contender: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Both by seed, of the same seeds: what a seed does to both alike does not blur it."""
    assert contender.keys() == baseline.keys()
    values = [contender[seed] - baseline[seed] for seed in sorted(contender)]
    found = spread(values)
    if found.mean is None or found.deviation is None:
        return Difference(values, found.mean, None, None)
    freedom = len(values) - 1
    error = found.deviation / math.sqrt(len(values))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    # Equal differences have no error to divide by: then any but zero is beyond it.
    ratio = abs(found.mean) / error if error else math.inf if found.mean else 0.0
    p_value = 2 * float(student_t.sf(ratio, freedom))
    return Difference(values, found.mean, (found.mean - half, found.mean + half), p_value)


def loss_at(curve: Sequence[Point], axis: Axis, value: float) -> float:
    """Validation loss at `value` > 0 tokens or FLOPs: linear in the logarithm of the axis between
    two validations. NaN before the first one after a step and beyond the last one."""
    trained = trained_points(curve)
    places = [getattr(point, axis) for point in trained]
    if not places or not places[0] <= value <= places[-1]:
        return math.nan
    losses = [point.loss for point in trained]
    return float(np.interp(math.log(value), np.log(places), losses))


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Means of losses over one contender's runs, which were validated after the same steps; as far
    as all of them are finite."""
    means = []
    for points in zip(*curves, strict=False):
        assert len({point.step for point in points}) == 1
        loss = fmean(point.loss for point in points)
        if not math.isfinite(loss):
            break
        means.append(Point(points[0].step, points[0].tokens, points[0].flops, loss))
    return means


def flops_to_reach(curve: Sequence[Point], loss: float) -> float | None:
    """FLOPs after which `curve` is first at `loss` or below, linear in their logarithm between two
    validations; those of the first validation after a step if it is there by then. None if it never
    is."""
    trained = trained_points(curve)
    if trained and trained[0].loss <= loss:
        return trained[0].flops
    for before, after in pairwise(trained):
        if after.loss <= loss:
            way = (before.loss - loss) / (before.loss - after.loss)
            return before.flops * (after.flops / before.flops) ** way
    return None


def trained_points(curve: Sequence[Point]) -> list[Point]:
    """Those after at least one step, which have a place on a logarithmic axis."""
    return [point for point in curve if point.step > 0]

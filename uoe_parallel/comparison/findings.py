"""What a comparison comes to in numbers: everything that its tables, words and charts tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from uoe_parallel.comparison.results import Comparison, Point, Result, Run
from uoe_parallel.comparison.statistics import (
    Axis,
    Difference,
    Spread,
    flops_to_reach,
    loss_at,
    mean_curve,
    paired_difference,
    spread,
    trained_points,
)

Family = Literal["baseline", "feed-forward only", "attention only", "both", "not routed"]


@dataclass(frozen=True)
class Measure:
    """A number of a run by which contenders are judged."""

    name: str
    unit: str
    """Of differences in words."""
    scale: float
    """From the number to the unit."""
    digits: int
    """Behind the point, in that unit."""
    higher_is_better: bool
    of: Callable[[Run], float]


LOSS = Measure("loss", "nats", 1.0, 4, False, lambda run: run.loss)
ACCURACY = Measure("accuracy", "points", 100.0, 2, True, lambda run: run.accuracy)
"""In percentage points."""


@dataclass(frozen=True)
class Pair:
    """A contender beside a baseline."""

    contender: str
    baseline: str
    measure: Measure
    difference: Difference


@dataclass(frozen=True)
class AtEqual:
    """Validation losses where all contenders have trained equally far."""

    axis: Axis
    at: float
    """Tokens or FLOPs: the most that every run has reached that did not diverge."""
    losses: dict[str, Spread]
    """By contender, without those that were not validated so early."""
    differences: dict[str, Difference]
    """To the reference, of the others."""


@dataclass(frozen=True)
class Findings:
    """A comparison with what follows from it. There is at least one result."""

    comparison: Comparison
    results: dict[str, Result]
    baselines: list[str]
    """Those that have results."""
    measures: list[Measure]
    """The first one is what contenders are judged by."""
    held_out: dict[str, dict[str, Spread]]
    """By measure and contender."""
    pairs: list[Pair]
    """Each contender beside each baseline, by measure; two baselines once."""
    at_equal: list[AtEqual]
    share_to_reach: dict[str, dict[str, float | None]]
    """By baseline and contender: the share of the baseline's FLOPs after which the contender's mean
    validation curve is first at the loss that the baseline's ends with. None if it never is."""

    @property
    def reference(self) -> Result:
        """What relative columns are relative to: the first baseline, or the first contender where
        none of the baselines has results yet."""
        return self.results[self.baselines[0]] if self.baselines else self.comparison.results[0]

    @property
    def missing(self) -> list[str]:
        """Contenders that have no whole set of runs yet."""
        return [name for name in self.comparison.config.contenders if name not in self.results]

    def pair(self, contender: str, baseline: str, measure: Measure) -> Pair | None:
        """None for a baseline beside itself or beside a later one."""
        wanted = (contender, baseline, measure.name)
        found = (p for p in self.pairs if (p.contender, p.baseline, p.measure.name) == wanted)
        return next(found, None)

    def family(self, contender: str) -> Family:
        """By what of it is routed."""
        if contender in self.baselines:
            return "baseline"
        kinds = {kind for run in self.results[contender].runs for kind in run.experts_per_token}
        if kinds == {"attention", "feed_forward"}:
            return "both"
        if not kinds:
            return "not routed"
        return "attention only" if "attention" in kinds else "feed-forward only"


def find(comparison: Comparison) -> Findings:
    """Everything that follows from at least one result."""
    results = {result.name: result for result in comparison.results}
    measures = [ACCURACY, LOSS] if comparison.task == "classification" else [LOSS]
    baselines = [name for name in comparison.config.baselines if name in results]
    return Findings(
        comparison=comparison,
        results=results,
        baselines=baselines,
        measures=measures,
        held_out={
            measure.name: {name: spread(_values(r, measure)) for name, r in results.items()}
            for measure in measures
        },
        pairs=[
            Pair(name, baseline, measure, _difference(result, results[baseline], measure))
            for measure in measures
            for name, result in results.items()
            for place, baseline in enumerate(baselines)
            if name not in baselines[: place + 1]
        ],
        at_equal=[
            found for axis in ("tokens", "flops") if (found := _at_equal(results, baselines, axis))
        ],
        share_to_reach={name: _shares(results, name) for name in baselines},
    )


def findings_as_json(findings: Findings) -> dict[str, Any]:
    """All of it in JSON's types: losses in nats, accuracies from 0 to 1, bytes, seconds. What is
    not finite, such as the loss of a run that diverged, is null in the file."""
    tree = asdict(findings.comparison)
    tree["config"] = findings.comparison.config.model_dump(mode="json")
    tree["reference"] = findings.reference.name
    tree["missing"] = findings.missing
    tree["held_out"] = {
        measure: {name: asdict(found) for name, found in by_name.items()}
        for measure, by_name in findings.held_out.items()
    }
    tree["differences"] = [
        {"contender": p.contender, "baseline": p.baseline, "measure": p.measure.name}
        | asdict(p.difference)
        for p in findings.pairs
    ]
    tree["at_equal"] = {found.axis: asdict(found) for found in findings.at_equal}
    tree["share_to_reach"] = findings.share_to_reach
    return tree


def is_finite(run: Run) -> bool:
    """Whether the run ended with a loss at all."""
    return math.isfinite(run.loss)


def curve_of(result: Result) -> list[Point]:
    """The mean over its runs."""
    return mean_curve([run.curve for run in result.runs])


def _values(result: Result, measure: Measure) -> list[float]:
    """A run that diverged has no accuracy to speak of, whatever its last weights choose."""
    return [measure.of(run) if is_finite(run) else math.nan for run in result.runs]


def _difference(result: Result, baseline: Result, measure: Measure) -> Difference:
    ours, theirs = (
        dict(zip((run.seed for run in one.runs), _values(one, measure), strict=True))
        for one in (result, baseline)
    )
    return paired_difference(ours, theirs)


def _at_equal(results: dict[str, Result], baselines: list[str], axis: Axis) -> AtEqual | None:
    ends = [
        getattr(run.curve[-1], axis)
        for result in results.values()
        for run in result.runs
        if is_finite(run) and trained_points(run.curve)
    ]
    if not ends:
        return None
    at = min(ends)
    losses = {
        name: {run.seed: loss_at(run.curve, axis, at) for run in result.runs}
        for name, result in results.items()
        if all(_is_validated_by(run, axis, at) for run in result.runs)
    }
    reference = baselines[0] if baselines and baselines[0] in losses else None
    return AtEqual(
        axis=axis,
        at=at,
        losses={name: spread(list(values.values())) for name, values in losses.items()},
        differences={
            name: paired_difference(values, losses[reference])
            for name, values in losses.items()
            if reference is not None and name != reference
        },
    )


def _is_validated_by(run: Run, axis: Axis, at: float) -> bool:
    trained = trained_points(run.curve)
    return not trained or getattr(trained[0], axis) <= at


def _shares(results: dict[str, Result], baseline: str) -> dict[str, float | None]:
    """A baseline of which a run diverged has no final loss to reach."""
    runs = results[baseline].runs
    if not all(is_finite(run) and math.isfinite(run.curve[-1].loss) for run in runs):
        return dict.fromkeys(results)
    goal = curve_of(results[baseline])[-1]
    reached = {name: flops_to_reach(curve_of(r), goal.loss) for name, r in results.items()}
    return {name: flops and flops / goal.flops for name, flops in reached.items()}

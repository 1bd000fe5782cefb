"""A comparison in pictures: validation losses over FLOPs and over tokens, and differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator

from uoe_parallel.comparison.findings import Family, Findings, curve_of
from uoe_parallel.comparison.results import Point, Result
from uoe_parallel.comparison.statistics import Axis, loss_at, trained_points
from uoe_parallel.comparison.tables import in_short
from uoe_parallel.profiling.style import STYLE

COLOURS: dict[Family, list[str]] = {
    "baseline": ["#000000", "#7a7a7a", "#a8a8a8"],
    "feed-forward only": ["#08519c", "#4292c6", "#35b4c8"],
    "attention only": ["#006d2c", "#41ab5d", "#8bb82e"],
    "both": ["#b30000", "#f16913", "#d81b60", "#7a3b12", "#e0a100"],
    "not routed": ["#54278f", "#9e6ebd", "#c59be0"],
}
DASHES = ["-", "--", "-.", ":"]
"""In turn with the colours, of which no family has four: members differ in one or the other."""
SHOWN_FROM = 0.18
"""The share of a run from which on curves are shown: before, all fall steeply."""
A_STEP = 0.02
"""Budgets are met to a step: so much beyond the end of a curve, relatively, its end is taken."""


def write_curves(findings: Findings, folder: Path) -> list[Path]:
    """PNG files in `folder`; raises OSError."""
    written = []
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("loss_by_flops.png", draw_losses(findings, "flops")),
            ("loss_by_tokens.png", draw_losses(findings, "tokens")),
            ("differences.png", draw_differences(findings)),
        ):
            figure.savefig(folder / name)
            written.append(folder / name)
    return written


def draw_losses(findings: Findings, axis: Axis) -> Figure:
    """Validation losses over training FLOPs or tokens, mean and range over seeds; below, what they
    are above or below the reference's at the same place."""
    figure = Figure(figsize=(10.5, 7), layout="constrained")
    losses, beside = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    looks = _looks(findings)
    for name, result in findings.results.items():
        _draw_loss(losses, result, axis, looks[name])
        _draw_beside(beside, result, findings.reference, axis, looks[name])
    unit = {"flops": "training FLOPs", "tokens": "training tokens"}[axis]
    seeds = findings.comparison.config.seeds
    over = f"mean and range over {seeds} seeds" if seeds > 1 else "one seed"
    losses.set_title(f"Validation loss over {unit}: {over}", loc="left")
    losses.set_ylabel("nats")
    _frame(losses, findings, axis)
    beside.set(xlabel=unit, ylabel=f"nats above {findings.reference.name}")
    if _is_of_bytes(findings):
        bits = losses.secondary_yaxis(
            "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
        )
        bits.set_ylabel("bits/byte")
    figure.legend(handles=_legend(findings, losses), loc="outside right upper")
    return figure


def draw_differences(findings: Findings) -> Figure:
    """Held-out results minus the reference's: each seed, their mean and its interval."""
    measure, reference = findings.measures[0], findings.reference.name
    pairs = [p for p in findings.pairs if p.baseline == reference and p.measure is measure]
    figure = Figure(figsize=(8.5, 1.8 + 0.36 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    looks = _looks(findings)
    for height, pair in enumerate(pairs):
        difference, colour = pair.difference, looks[pair.contender]["color"]
        if difference.mean is None:
            axes.annotate(
                " not compared: a run has no finite loss", (0, height), va="center", color=colour
            )
            continue
        values = [measure.scale * value for value in difference.values]
        axes.plot(values, [height] * len(values), "|", color=colour, ms=9, alpha=0.6)
        axes.plot(measure.scale * difference.mean, height, "o", color=colour)
        if difference.interval is not None:
            ends = [measure.scale * end for end in difference.interval]
            axes.plot(ends, [height] * 2, color=colour, lw=1.8)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(pairs)), labels=[pair.contender for pair in pairs])
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    axes.grid(False, axis="y")
    better = "right" if measure.higher_is_better else "left"
    axes.set_xlabel(
        f"held-out {measure.name} minus {reference}'s, {measure.unit} ({better} of 0 is better)"
    )
    axes.set_title(f"Beside {reference}: mean, 95 % interval and each seed", loc="left")
    return figure


def _looks(findings: Findings) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each contender's lines."""
    places = {family: count() for family in COLOURS}
    looks = {}
    for name in findings.results:
        family = findings.family(name)
        place = next(places[family])
        colours = COLOURS[family]
        looks[name] = {
            "color": colours[place % len(colours)],
            "ls": DASHES[place % len(DASHES)],
            "lw": 2.2 if family == "baseline" else 1.5,
        }
    return looks


def _legend(findings: Findings, axes: Axes) -> list[Any]:
    """Lines that were drawn, family by family."""
    lines = dict(zip(findings.results, axes.get_lines(), strict=True))
    handles = []
    for family in COLOURS:
        if members := [name for name in lines if findings.family(name) == family]:
            handles.append(Patch(alpha=0, label=f"{family}:"))
            handles += [lines[name] for name in members]
    return handles


def _frame(axes: Axes, findings: Findings, axis: Axis) -> None:
    """Show what there is of the late parts of runs."""
    late = [p for result in findings.results.values() for p in _late(result)]
    if not late:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_short(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    low, high = (end(point.loss for point in late) for end in (min, max))
    margin = 0.05 * (high - low or 1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=min(getattr(point, axis) for point in late) / 1.05)


def _late(result: Result) -> list[Point]:
    """Of the mean curve."""
    first = max(1, SHOWN_FROM * result.steps)
    return [point for point in curve_of(result) if point.step >= first]


def _draw_loss(axes: Axes, result: Result, axis: Axis, look: dict[str, Any]) -> None:
    mean = trained_points(curve_of(result))
    places = [getattr(point, axis) for point in mean]
    by_run = [[point.loss for point in trained_points(run.curve)] for run in result.runs]
    label = result.name
    if lost := sum(not math.isfinite(run.loss) for run in result.runs):
        label += f" ({lost} of {len(result.runs)} diverged)"
    axes.plot(places, [point.loss for point in mean], label=label, **look)
    at_places = list(zip(*by_run, strict=False))[: len(places)]
    low, high = ([end(losses) for losses in at_places] for end in (min, max))
    axes.fill_between(places, low, high, color=look["color"], alpha=0.12, lw=0)


def _draw_beside(
    axes: Axes, result: Result, reference: Result, axis: Axis, look: dict[str, Any]
) -> None:
    ours, theirs = _late(result), trained_points(curve_of(reference))
    places = [getattr(point, axis) for point in ours]
    differences = [
        point.loss - loss_at(theirs, axis, _within(theirs, axis, place))
        for point, place in zip(ours, places, strict=True)
    ]
    axes.plot(places, differences, **look)


def _within(curve: Sequence[Point], axis: Axis, place: float) -> float:
    """The end of the curve where `place` is a step beyond it."""
    for end in (curve[0], curve[-1]) if curve else ():
        if abs(place - getattr(end, axis)) <= A_STEP * place:
            return getattr(end, axis)
    return place


def _is_of_bytes(findings: Findings) -> bool:
    return any(run.bits_per_byte is not None for run in findings.reference.runs)

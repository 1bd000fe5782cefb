"""Pictures of a profile: how each rank's step goes, and what bandwidth which size reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from uoe_parallel.profiling.alone import Alone
from uoe_parallel.profiling.report import Profile, in_bytes_per_second
from uoe_parallel.profiling.style import STYLE
from uoe_parallel.profiling.summary import Row

COLOURS = {
    "dispatch": "#1f77b4",
    "combine": "#17becf",
    "gather": "#2ca02c",
    "reduce": "#bcbd22",
    "pipeline": "#9467bd",
    "gradient": "#d62728",
    "ZeRO": "#ff7f0e",
    "control": "#7f7f7f",
}
"""By category."""
COMPUTE = "#e9e9e9"
MARKERS = {
    "all_reduce": "o",
    "all_gather": "^",
    "reduce_scatter": "v",
    "all_to_all": "s",
    "send": "D",
    "broadcast": "P",
}


def write_profile_charts(profile: Profile, folder: Path) -> None:
    """PNG files; raises OSError."""
    with mpl.rc_context(STYLE):
        draw_times(profile).savefig(folder / "times.png")
        draw_bandwidth(profile.rows).savefig(folder / "bandwidth.png")


def write_sweep_chart(alone: Sequence[Alone], path: Path) -> None:
    """A PNG file; raises OSError."""
    with mpl.rc_context(STYLE):
        draw_sweep(alone).savefig(path)


def draw_times(profile: Profile) -> Figure:
    """A bar of a step for each rank: what it stands still for, waiting hatched, and the rest."""
    ranks = profile.world_size
    step = 1e3 * sum(profile.seconds.counted) / len(profile.seconds.counted)
    width = min(max(6.5, 0.45 * ranks + 3), 16)
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    axes = figure.subplots()
    base = np.zeros(ranks)
    handles: list[Any] = []
    for found in profile.categories:
        colour = COLOURS[found.category]
        for part, hatch in ((found.moving, None), (found.waiting, "////")):
            top = base + 1e3 * np.array(part)
            _bars(axes, base, top, colour, hatch)
            base = top
        handles.append(Patch(facecolor=colour, label=found.category))
    _bars(axes, base, np.maximum(base, step), COMPUTE, None)
    handles.append(Patch(facecolor=COMPUTE, label="all else: compute"))
    handles.append(Patch(facecolor="white", edgecolor="0.3", hatch="////", label="of it, waiting"))
    axes.set(xlabel="rank", ylabel="ms of a step", xlim=(-0.6, ranks - 0.4))
    axes.set_ylim(0, 1.02 * max(step, base.max()))
    axes.xaxis.set_major_locator(MaxNLocator(min(ranks, 16), integer=True))
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    figure.legend(handles=handles[::-1], loc="outside right upper")
    axes.set_title("What ranks stand still for in a step", loc="left")
    return figure


def _bars(axes: Axes, base: np.ndarray, top: np.ndarray, colour: str, hatch: str | None) -> None:
    """One patch for all ranks, whatever their number, with gaps between few."""
    half = 0.4 if len(base) <= 64 else 0.5
    centres = np.arange(len(base))
    edges = np.append(np.stack((centres - half, centres + half), 1).ravel(), len(base))
    low, high = (np.stack((values, base), 1).ravel() for values in (base, top))
    style: dict[str, Any] = {"facecolor": colour, "linewidth": 0}
    if hatch is not None:
        style |= {"hatch": hatch, "edgecolor": "white"}
    axes.stairs(high, edges, baseline=low, fill=True, **style)


def draw_bandwidth(rows: Sequence[Row]) -> Figure:
    """Bus bandwidth over payload of a call: in the step full, alone hollow."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    plot = figure.subplots()
    names = dict.fromkeys(row.axis for row in rows)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    operations: dict[str, None] = {}
    for row in rows:
        if row.bus_bandwidth is None or row.operation not in MARKERS:
            continue
        colour, marker = colours[row.axis], MARKERS[row.operation]
        plot.plot(row.typical_payload, row.bus_bandwidth, marker, color=colour, ms=6, zorder=3)
        if row.alone_bandwidth is not None:
            ends = [row.bus_bandwidth, row.alone_bandwidth]
            plot.plot([row.typical_payload] * 2, ends, color=colour, lw=0.8, alpha=0.6, zorder=1)
            hollow = {"mfc": "none", "mec": colour, "ms": 8, "mew": 1.3, "alpha": 0.7}
            plot.plot(row.typical_payload, row.alone_bandwidth, marker, **hollow)
        operations[row.operation] = None
    _scales(plot, 4)
    handles: list[Any] = [
        *(Patch(facecolor=colour, label=f"{name} groups") for name, colour in colours.items()),
        *(_mark(MARKERS[name], name, full=True) for name in operations),
    ]
    if rows:
        handles += [_mark("o", "in the step", full=True), _mark("o", "alone", full=False)]
    figure.legend(handles=handles, loc="outside right upper")
    plot.set_title("Size against bandwidth", loc="left")
    return figure


def draw_sweep(alone: Sequence[Alone]) -> Figure:
    """Bus bandwidth of collectives alone over their payload, a panel for each operation."""
    operations = list(dict.fromkeys(one.size.operation for one in alone))
    names = list(dict.fromkeys(one.size.axis for one in alone))
    figure = Figure(figsize=(1.5 + 3.4 * len(operations), 4.2), layout="constrained")
    panels = figure.subplots(1, len(operations), squeeze=False, sharey=True)[0]
    for panel, operation in zip(panels, operations, strict=True):
        for name in names:
            found = [
                o for o in _slowest(alone) if (o.size.axis, o.size.operation) == (name, operation)
            ]
            points = sorted((one.size.payload, one.bus_bandwidth) for one in found)
            if points:
                colour = f"C{names.index(name)}"
                panel.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=name)
        _scales(panel, 16)
        panel.set_title(operation)
        panel.label_outer()
    handles = [
        Line2D([], [], color=f"C{n}", label=f"{name} groups") for n, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names))
    figure.suptitle("Collectives alone: the slowest group of each axis")
    return figure


def _slowest(alone: Iterable[Alone]) -> list[Alone]:
    """Of each size the slowest group."""
    found: dict[Any, Alone] = {}
    for one in alone:
        if one.size not in found or one.bus_bandwidth < found[one.size].bus_bandwidth:
            found[one.size] = one
    return list(found.values())


def _mark(marker: str, label: str, *, full: bool) -> Line2D:
    face = "0.3" if full else "none"
    return Line2D([], [], ls="", marker=marker, mfc=face, mec="0.3", label=label)


def _scales(plot: Axes, between: int) -> None:
    """`between`: how many times a marked size is the one before."""
    plot.set_xscale("log", base=2)
    plot.set_yscale("log")
    plot.xaxis.set_major_locator(LogLocator(base=between, numticks=12))
    plot.xaxis.set_major_formatter(FuncFormatter(_bytes))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes_per_second(value)))
    plot.set(xlabel="bytes that a rank puts into a call", ylabel="bus bandwidth")


def _bytes(size: float, _: object = None) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:g} {unit}"
        size /= 1024
    return f"{size:g} GiB"

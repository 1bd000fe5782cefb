"""How layers scale: over the number of slices, and over the length of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from uoe_parallel.errors import UserError
from uoe_parallel.profiling.style import STYLE

Entry = dict[str, Any]

PAPER_LENGTHS = (1024, 2048, 4096)
PAPER_MILLISECONDS = {
    "UoE": (76, 118, 248),
    "XMoE": (82, 277, 1030),
    "DeepSeek-V3": (120, 181, 440),
}
"""Forward and backward, read off the plot of arXiv 2503.02495."""
PAPER_GIGABYTES = {"UoE": (2.5, 4.3, 10.4), "XMoE": (4.5, 8.8, 30.0)}
PAPER_COLOURS = {"UoE": "black", "XMoE": "0.45", "DeepSeek-V3": "0.65"}


def plot(results: Entry, output: Path) -> list[Path]:
    """Draw what there are sections for; the files that were written. Raises UserError if there is
    no place for them."""
    written = []
    for name, (section, draw) in FIGURES.items():
        measured = [found for found in results["sections"] if found["section"] == section]
        if not measured:
            continue
        with mpl.rc_context(STYLE):
            figure = draw(measured)
            try:
                output.mkdir(parents=True, exist_ok=True)
                figure.savefig(output / name)
            except OSError as error:
                raise UserError(
                    f"{output / name}: {error.strerror}; choose another --output"
                ) from None
        written.append(output / name)
    return written


def draw_slices(sections: Sequence[Entry]) -> Figure:
    """Time over the dense layer's of the same active width, one panel for each number of ranks."""
    figure = Figure(figsize=(1 + 4 * len(sections), 4.2), layout="constrained")
    panels = figure.subplots(1, len(sections), squeeze=False, sharey=True)[0]
    for axes, section in zip(panels, sections, strict=True):
        timed = [e for e in section["entries"] if e.get("experts") and e.get("this_over_dense")]
        for contender in dict.fromkeys(entry["contender"] for entry in timed):
            own = [entry for entry in timed if entry["contender"] == contender]
            experts = [entry["experts"] for entry in own]
            spreads = [entry["this_over_dense"] for entry in own]
            [line] = axes.plot(experts, [s["median"] for s in spreads], "o-", label=contender)
            low, high = ([s[end] for s in spreads] for end in ("smallest", "largest"))
            axes.fill_between(experts, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes.axhline(1, color="black", lw=0.8, ls=":")
        _logarithmic(axes, sorted({entry["experts"] for entry in timed}))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(title=_ranks(section), xlabel="slices n, of the same active width")
    panels[0].set_ylabel("time / dense layer of the same active width")
    panels[0].legend()
    figure.suptitle("forward and backward: median and range over rounds")
    return figure


def draw_lengths(sections: Sequence[Entry]) -> Figure:
    """Attention's time and peak memory, beside what the paper published of whole models."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for section in sections:
        measured = [entry for entry in section["entries"] if entry.get("length")]
        for contender in dict.fromkeys(entry["contender"] for entry in measured):
            own = [entry for entry in measured if entry["contender"] == contender]
            label = f"{contender}, {_ranks(section)}" if len(sections) > 1 else contender
            _draw(times, own, label, lambda e: e.get("seconds") and median(e["seconds"]) * 1e3)
            _draw(memory, own, label, lambda e: e.get("peak_bytes") and e["peak_bytes"] / 1e6)
    for axes, published in (
        (times, PAPER_MILLISECONDS),
        (memory, {name: [gb * 1e3 for gb in row] for name, row in PAPER_GIGABYTES.items()}),
    ):
        for name, values in published.items():
            label = f"{name}, published by the paper"
            axes.plot(PAPER_LENGTHS, values, "--", color=PAPER_COLOURS[name], lw=1, label=label)
        lengths = {entry["length"] for s in sections for entry in s["entries"] if "length" in entry}
        _logarithmic(axes, sorted({*lengths, *PAPER_LENGTHS}))
        axes.set_yscale("log")
        axes.set_xlabel("length of a sequence")
        axes.legend(fontsize=8)
    times.set(title="forward and backward", ylabel="milliseconds")
    memory.set(title="peak memory", ylabel="megabytes")
    figure.suptitle(
        "one attention layer, measured; dashed: whole models on the paper's own hardware"
    )
    return figure


FIGURES: dict[str, tuple[str, Callable[[Sequence[Entry]], Figure]]] = {
    "slices.png": ("narrow", draw_slices),
    "lengths.png": ("attention", draw_lengths),
}
"""File, the section that it shows, and how."""


def _draw(
    axes: Axes, entries: Sequence[Entry], label: str, value: Callable[[Entry], float | None]
) -> None:
    points = [(entry["length"], value(entry)) for entry in entries if value(entry)]
    if points:
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)


def _logarithmic(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _ranks(section: Entry) -> str:
    return f"{section['ranks']} rank{'s' * (section['ranks'] > 1)}"

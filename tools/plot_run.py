"""Draw what a run recorded, also while it is running.

    python tools/plot_run.py RUN_DIR [--output DIR]

Reads RUN_DIR/metrics.jsonl and writes PNG files to DIR, RUN_DIR/plots if it is not given:

    loss.png     training and validation loss
    load.png     how much of the tokens every expert of every layer takes, over steps
    gates.png    the gates of chosen experts, by layer, over steps
    balance.png  the spread of the load over layers, dropped and unrouted shares, drift of
                 thresholds and biases

The last three are for runs with routed layers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from uoe_parallel.errors import UserError
from uoe_parallel.routing.statistics import GATE_EDGES
from uoe_parallel.training.metrics import PERCENTILES, read_metrics

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 13,
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "legend.frameon": False,
}
KINDS = {"attention": "attention", "feed_forward": "feed-forward"}
"""Kinds of blocks by the end of their names, as people call them."""
COLOURS = {"train": "#1f77b4", "validation": "#d62728", "test": "#2ca02c"}
MOST_COLUMNS = 400
"""Of a heat map: reports of longer runs are averaged."""
LOAD_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2 / 3, 1, 3 / 2, 2, 4, 8, 16)
BETWEEN = (2 / 3, 3 / 2)
"""Loads that are marked where there is room."""
GATE_TICKS = (0.0, 0.5, 1.0, 2.0, 5.0, 14.0)
"""Gates that are marked, all of them edges of bins."""


@dataclass(frozen=True)
class Block:
    """A routed block: its name in the record, its layer and its kind."""

    name: str
    layer: int
    kind: str

    @classmethod
    def parse(cls, name: str) -> Block:
        _, layer, kind = name.split(".")
        return cls(name, int(layer), kind)


class Run:
    """The records of one run. Steps are optimizer steps, finished when a record was written."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is nothing to draw."""
        path = folder / "metrics.jsonl"
        try:
            records = read_metrics(path)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; name the run_dir of a run that has begun"
            ) from None
        self.records = [record for record in records if "loss" in record]
        if not self.records:
            raise UserError(f"{path}: no loss is recorded yet; try again after the first report")
        self.name = folder.resolve().name
        names = [
            name.partition("/")[2]
            for name in self._last_of("train")
            if name.startswith("load/layers.")
        ]
        self.blocks = sorted(map(Block.parse, names), key=lambda block: (block.kind, block.layer))
        self.routed = [
            r for r in self.records if names and all(f"load/{name}" in r for name in names)
        ]

    def _last_of(self, kind: str) -> dict[str, Any]:
        return next((r for r in reversed(self.records) if r["kind"] == kind), {})

    @property
    def blocks_by_kind(self) -> list[list[Block]]:
        return [list(of_kind) for _, of_kind in groupby(self.blocks, lambda block: block.kind)]

    @property
    def tokens_per_step(self) -> float | None:
        last = self._last_of("train")
        return last["tokens"] / last["step"] if last.get("tokens") else None

    @property
    def step_edges(self) -> np.ndarray:
        """[reports + 1]: where the steps that a report is about begin and end."""
        steps = [record["step"] for record in self.routed]
        first = 2 * steps[0] - steps[1] if len(steps) > 1 else 0
        return np.array([max(first, 0), *steps], dtype=float)

    def series(self, name: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """The steps [reports] at which a value was recorded, and the value there: [reports], or of
        a list [reports, its length]. NaN where the record has null."""
        found = [(r["step"], r[name]) for r in self.records if r["kind"] == kind and name in r]
        return np.array([step for step, _ in found]), np.array([v for _, v in found], dtype=float)

    def over_blocks(self, value: str) -> np.ndarray:
        """A value of each block that has it: [reports, blocks]. No column if none has it."""
        columns = [
            [record[name] for record in self.routed]
            for name in (f"{value}/{block.name}" for block in self.blocks)
            if all(name in record for record in self.routed)
        ]
        return np.array(columns, dtype=float).T.reshape(len(self.routed), -1)


def draw_loss(run: Run) -> Figure:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        steps, losses = run.series("loss", kind)
        if not len(steps):
            continue
        last = losses[np.isfinite(losses)][-1:]
        label = f"{kind}, last {last[0]:.4g}" if len(last) else kind
        marker = "o" if kind != "train" or len(steps) == 1 else ""
        width = 1.2 if kind == "train" else 1.8
        axes.plot(steps, losses, color=colour, marker=marker, ms=4, lw=width, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=len(COLOURS))
    if run.tokens_per_step is not None:
        _scaled_axis(axes.secondary_xaxis, "top", run.tokens_per_step, "tokens")
    per_byte = _bits_per_byte(run)
    if per_byte is not None:
        _scaled_axis(axes.secondary_yaxis, "right", per_byte, "bits per byte")
    figure.suptitle(f"{run.name}: loss")
    return figure


def _bits_per_byte(run: Run) -> float | None:
    """Bits per byte of one nat, if that is the same in all records."""
    ratios = [
        r["bits_per_byte"] / r["loss"] for r in run.records if r["loss"] and r.get("bits_per_byte")
    ]
    same = ratios and math.isclose(min(ratios), max(ratios), rel_tol=1e-6)
    return ratios[0] if same else None


def _scaled_axis(make: Callable[..., Any], side: str, factor: float, label: str) -> None:
    axis = make(side, functions=(lambda x: x * factor, lambda x: x / factor))
    axis.set(**{"xlabel" if side == "top" else "ylabel": label})
    if side == "top":
        axis.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(number: float, _: object = None) -> str:
    """1500 as 1.5k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def draw_load(run: Run) -> Figure:
    panels = run.blocks_by_kind
    loads = [_relative_load(run, blocks) for blocks in panels]
    # As far as nearly all go, a power of two, the same in both directions.
    top = np.nanquantile(np.concatenate([load.ravel() for load in loads]), 0.995)
    limit = 2.0 ** np.clip(np.ceil(np.log2(max(top, 1.0))), 1, 4)
    norm = LogNorm(1 / limit, limit)
    height = 1.2 + min(max(3.0, 0.1 * max(map(len, loads))), 20.0)
    figure, body, bar_axes = _figure_with_bar(1.5 + 6.0 * len(panels), height)
    mesh: Any = None
    for axes, blocks, load in zip(
        body.subplots(1, len(panels), squeeze=False)[0], panels, loads, strict=True
    ):
        edges, load = columns(run.step_edges, load)
        rows = np.arange(len(load) + 1)
        mesh = axes.pcolormesh(edges, rows, np.maximum(load, 1e-9), norm=norm, cmap="RdBu_r")
        _mark_layers(axes, blocks, len(load) // len(blocks))
        axes.set(title=KINDS[blocks[0].kind], xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ticks = [f for f in LOAD_TICKS if 1 / limit <= f <= limit and (limit == 2 or f not in BETWEEN)]
    bar = figure.colorbar(mesh, cax=bar_axes, extend="both", orientation="horizontal", ticks=ticks)
    bar.set_ticks(ticks, labels=[str(Fraction(tick).limit_denominator(16)) for tick in ticks])
    bar.set_label("load of an expert / mean load of its layer's experts (1 is even)")
    bar.ax.xaxis.set_minor_locator(NullLocator())
    body.suptitle(f"{run.name}: load of experts, layer by layer")
    return figure


def _figure_with_bar(width: float, height: float) -> tuple[Figure, SubFigure, Axes]:
    """A figure (inches), its main part of this height, and axes for a colour bar below that."""
    foot = 0.9
    figure = Figure(figsize=(width, height + foot), layout="constrained")
    above, below = figure.add_gridspec(2, 1, height_ratios=[height, foot])
    bar_width = min(0.8, 6.0 / width)
    return (
        figure,
        figure.add_subfigure(above),
        figure.add_subfigure(below).add_axes((0.5 - bar_width / 2, 0.6, bar_width, 0.2)),
    )


def _relative_load(run: Run, blocks: Sequence[Block]) -> np.ndarray:
    """[all blocks' experts, reports]: load over the mean of the block."""
    shares = [
        np.array([record[f"load/{block.name}"] for record in run.routed], dtype=float).T
        for block in blocks
    ]
    return np.concatenate([share * len(share) for share in shares])


def columns(edges: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges [n + 1] and values [rows, n] with neighbouring columns averaged, if n is large."""
    size = math.ceil(values.shape[1] / MOST_COLUMNS)
    starts = np.arange(0, values.shape[1], size)
    counts = np.diff(np.append(starts, values.shape[1]))
    return np.append(edges[starts], edges[-1]), np.add.reduceat(values, starts, axis=1) / counts


def _mark_layers(axes: Axes, blocks: Sequence[Block], experts: int) -> None:
    """Rows from the top, a line between layers, and as many labels as there is room for."""
    axes.set_ylim(len(blocks) * experts, 0)
    for row in range(1, len(blocks)):
        axes.axhline(row * experts, color="black", lw=0.6)
    every = math.ceil(len(blocks) / 64)
    axes.set_yticks(
        [(row + 0.5) * experts for row in range(0, len(blocks), every)],
        labels=[str(block.layer) for block in blocks[::every]],
    )
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(f"layer (a row is one of its {experts} experts)")


def draw_gates(run: Run) -> Figure:
    histograms = {
        block: np.array([r[f"gate_histogram/{block.name}"] for r in run.routed], dtype=float).T
        for block in run.blocks
    }
    # Bins in which no block ever had a gate are left out above.
    used = max(int(np.nonzero(h.max(axis=1) > 0)[0].max(initial=15)) for h in histograms.values())
    # As far as nearly all go: at first, all gates may lie in one bin.
    shares = np.concatenate([histogram.ravel() for histogram in histograms.values()])
    norm = PowerNorm(0.5, 0, np.quantile(shares[shares > 0], 0.98) if shares.any() else 1.0)
    width = min(8, max(2, math.ceil(math.sqrt(1.6 * len(run.blocks)))))
    rows = [
        of_kind[start : start + width]
        for of_kind in run.blocks_by_kind
        for start in range(0, len(of_kind), width)
    ]
    figure, body, bar_axes = _figure_with_bar(0.9 + 1.9 * width, 0.9 + 1.75 * len(rows))
    grid = body.subplots(len(rows), width, squeeze=False, sharex=True, sharey=True)
    mesh: Any = None
    for axes_of_row, blocks in zip(grid, rows, strict=True):
        for axes in axes_of_row[len(blocks) :]:
            axes.set_axis_off()
        for axes, block in zip(axes_of_row, blocks, strict=False):
            edges, shares = columns(run.step_edges, histograms[block][: used + 1])
            mesh = axes.pcolormesh(edges, np.arange(used + 2), shares, norm=norm, cmap="Blues")
            axes.axhline(GATE_EDGES.index(1.0), color="black", lw=0.5, ls=":")
            axes.set_title(f"{KINDS[block.kind]} {block.layer}", fontsize=9)
    ticks = {GATE_EDGES.index(gate): f"{gate:g}" for gate in GATE_TICKS}
    shown = [place for place in ticks if place <= used + 1]
    grid[0][0].set_yticks(shown, labels=[ticks[place] for place in shown])
    grid[0][0].xaxis.set_major_locator(MaxNLocator(2, integer=True))
    grid[0][0].xaxis.set_major_formatter(FuncFormatter(_short))
    body.supxlabel("optimizer step", fontsize=10)
    body.supylabel("gate of a chosen expert", fontsize=10)
    bar = figure.colorbar(mesh, cax=bar_axes, extend="max", orientation="horizontal")
    bar.set_label("share of the chosen pairs of a layer, by gate (1 leaves a result as it is)")
    body.suptitle(f"{run.name}: gates, layer by layer")
    return figure


def draw_balance(run: Run) -> Figure:
    panels = {
        "load_max_over_mean": "busiest expert / mean",
        "load_entropy": "entropy of load (1 is even)",
    }
    lost = {
        "dropped_share": "share of pairs dropped",
        "unrouted_share": "share of tokens unrouted",
    }
    panels |= {value: label for value, label in lost.items() if run.over_blocks(value).any()}
    states = sorted({n.partition("_drift/")[0] for n in run.routed[-1] if "_drift/" in n})
    panels |= {
        f"{name}_drift": f"change of a {name}\nbetween reports"
        for name in states
        if np.isfinite(run.over_blocks(f"{name}_drift")).any()
    }
    figure = Figure(figsize=(9, 1.2 + 2.5 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (value, label) in zip(grid, panels.items(), strict=True):
        _draw_spread(axes, run, value)
        axes.set_ylabel(label)
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{run.name}: balance over {len(run.blocks)} routed blocks")
    return figure


def _draw_spread(axes: Axes, run: Run, value: str) -> None:
    """The distribution of a value over blocks, at every report that has numbers."""
    values, steps = run.over_blocks(value), run.step_edges[1:]
    if len(steps) == 1:  # a level over the steps that it is about, to be seen
        values, steps = values.repeat(2, axis=0), run.step_edges
    known = np.isfinite(values).any(axis=1)
    values, steps = values[known], steps[known]
    low, p10, middle, p90, high = np.nanquantile(values, list(PERCENTILES.values()), axis=1)
    colour = "#1f77b4"
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0, label="lowest to highest")
    axes.fill_between(steps, p10, p90, color=colour, alpha=0.35, lw=0, label="10 % to 90 %")
    axes.plot(steps, middle, color=colour, label="median block")
    axes.grid(alpha=0.3)
    if value.endswith("_drift") and (middle > 0).any():  # it shrinks with the learning rate
        axes.set_yscale("log", nonpositive="mask")


FIGURES: dict[str, Callable[[Run], Figure]] = {
    "loss.png": draw_loss,
    "load.png": draw_load,
    "gates.png": draw_gates,
    "balance.png": draw_balance,
}


def plot(run_dir: Path, output: Path) -> list[Path]:
    """Draw what there is to draw of a run; the files that were written.

    Raises UserError if there is nothing to draw, or no place for it.
    """
    run = Run(run_dir)
    written = []
    for name, draw in FIGURES.items():
        if draw is not draw_loss and not run.blocks:
            continue
        with mpl.rc_context(STYLE):
            figure = draw(run)
            try:
                output.mkdir(parents=True, exist_ok=True)
                figure.savefig(output / name)
            except OSError as error:
                raise UserError(
                    f"{output / name}: {error.strerror}; choose another --output"
                ) from None
        written.append(output / name)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[4:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="the folder of a run, finished or not")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the pictures go")
    options = parser.parse_args(arguments)
    try:
        for path in plot(options.run_dir, options.output or options.run_dir / "plots"):
            print(path)
    except UserError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

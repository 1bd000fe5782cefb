"""Tables and plots of results that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from uoe_parallel.benchmark.plots import draw_lengths, draw_slices, plot
from uoe_parallel.benchmark.report import section_text
from uoe_parallel.errors import UserError


def _points(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def _spread(middle: float) -> dict[str, float]:
    return {"median": middle, "smallest": middle / 2, "largest": middle * 2}


def _section(name: str, entries: list[dict[str, Any]], ranks: int = 1) -> dict[str, Any]:
    return {"section": name, "ranks": ranks, "threads": 2, "entries": entries}


def _narrow(ranks: int) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [
        {
            "contender": contender,
            "experts": experts,
            "top_k": experts // 8,
            "seconds": [0.5, 0.25, 0.125],
            "this_over_dense": _spread(times * experts / 8),
        }
        for contender, times in (("this project", 1.0), ("megatron-core MoE", 2.0))
        for experts in (8, 16, 32, 64)
    ]
    dense = {"contender": "dense", "experts": None, "top_k": None, "seconds": [0.1, 0.2, 0.3]}
    gone = {"contender": "theirs", "experts": 8, "top_k": 1, "not_measured": "theirs 2.0: gone"}
    flat = {"compared": "n 64 over n 8", "ratio": _spread(1.5)}
    return _section("narrow", [*entries, dense, gone, flat], ranks)


def _attention() -> dict[str, Any]:
    return _section(
        "attention",
        [
            {
                "length": length,
                "contender": contender,
                "seconds": [share * length / 1e5, share * length / 1e6, share * length / 1e4],
                "peak_bytes": int(share * length * 1e5),
                "model_ratio": 1.125,
            }
            for length in (1024, 2048, 4096)
            for contender, share in (("SMHA, half of the tokens", 0.5), ("dense attention", 1.0))
        ],
    )


def test_table() -> None:
    heading, names, first, *lines = section_text(_narrow(2)).splitlines()
    assert heading == "narrow, 2 processes with 2 threads each"
    for name in ("contender", "experts", "top k", "median ms", "min - max", "this / dense"):
        assert name in names
    assert first.split() == [
        *("this", "project", "8", "1"),
        *("250.0", "125.0", "-", "500.0"),
        *("1.00", "(0.50", "-", "2.00)"),
    ]
    assert len({len(line) for line in (names, first, *lines[:6])}) == 1
    assert lines[7].split() == ["dense", "200.0", "100.0", "-", "300.0"]
    assert lines[8:] == [
        "theirs, n 8, k 1: not measured: theirs 2.0: gone",
        "n 64 over n 8: 1.50 (0.75 - 3.00)",
    ]


def test_table_of_other_fields() -> None:
    heading, names, first, *_ = section_text(_attention()).splitlines()
    assert heading == "attention, 1 process with 2 threads"
    order = ("length", "contender", "median ms", "min - max", "peak bytes", "model ratio")
    assert names.split() == " ".join(order).split()
    assert first.split()[-2:] == ["M", "1.12"] and "51.20 M" in first


def test_slices() -> None:
    figure = draw_slices([_narrow(1), _narrow(2)])
    assert [axes.get_title() for axes in figure.axes] == ["1 rank", "2 ranks"]
    ours, megatron = figure.axes[0].get_lines()[:2]
    assert (ours.get_label(), megatron.get_label()) == ("this project", "megatron-core MoE")
    assert _points(ours)[0] == [8, 16, 32, 64]
    assert _points(megatron)[1] == [2, 4, 8, 16]


def test_lengths() -> None:
    times, memory = draw_lengths([_attention()]).axes
    by_label = {line.get_label(): line for line in times.get_lines()}
    assert _points(by_label["dense attention"])[1] == pytest.approx([10.24, 20.48, 40.96])
    published = by_label["UoE, published by the paper"]
    assert published.get_linestyle() == "--"
    assert _points(published)[0] == [1024, 2048, 4096]
    assert _points(published)[1] == [76, 118, 248]
    by_label = {line.get_label(): line for line in memory.get_lines()}
    assert _points(by_label["dense attention"])[1] == pytest.approx([102.4, 204.8, 409.6])
    assert _points(by_label["UoE, published by the paper"])[1] == [2500, 4300, 10400]


def test_plots_are_those_of_the_sections(tmp_path: Path) -> None:
    assert plot({"sections": [_section("traffic", [])]}, tmp_path) == []
    written = plot({"sections": [_attention(), _narrow(1)]}, tmp_path / "new")
    assert written == [tmp_path / "new" / "slices.png", tmp_path / "new" / "lengths.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"slices.png: .*; choose another --output"):
        plot({"sections": [_narrow(1)]}, tmp_path / "file")

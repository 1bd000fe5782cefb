"""A profile for people and for programs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.profiling.made_up import joined, two_steps
from uoe_parallel.profiling.alone import Alone, bandwidths
from uoe_parallel.profiling.charts import draw_times, write_profile_charts, write_sweep_chart
from uoe_parallel.profiling.report import (
    Profile,
    StepSeconds,
    in_bytes_per_second,
    print_profile,
    print_sweep,
    profile_as_json,
)
from uoe_parallel.profiling.summary import (
    Amount,
    Size,
    category_times,
    group_rows,
    summarise,
)

DENSE = Size("tensor", "all_reduce", 1000)
ALONE = [Alone(DENSE, "0, 1", 0.05, 2e4, 2e4), Alone(DENSE, "2, 3", 0.1, 1e4, 1e4)]


def profile() -> Profile:
    found, _ = two_steps()
    expected = {
        ("dense blocks", "tensor", "all_reduce"): Amount(2, 2, 2000),
        ("dispatch rows", "tensor", "all_to_all"): Amount(2, 2, 3000),
    }
    rows = summarise(found, 2, expected)
    return Profile(
        layout="tp2-zero1",
        world_size=2,
        steps=[5, 6],
        seconds=StepSeconds([1.02, 1.0], [1.0, 1.0], in_turns=True),
        categories=category_times(found, 2, 2),
        rows=[replace(row, alone_bandwidth=bandwidths(ALONE).get(row.size)) for row in rows],
        groups=group_rows(found, 2),
        alone=ALONE,
    )


def _printed(shown: Profile) -> str:
    stream = io.StringIO()
    print_profile(shown, stream)
    return stream.getvalue()


def test_tables_fit_a_file_and_say_what_was_measured() -> None:
    text = _printed(profile())
    assert max(map(len, text.splitlines())) <= 160 and "\x1b" not in text
    assert "1,010 ms a step with the recorder, 1,000 ms without it (+1.0%;" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["reduce", "250", "24.8%", "150", "100", "100", "400"] in lines
    dense = "dense blocks tensor all_reduce 1 1000 B = 250 60% 0% 100-400 1 10 kB/s 13.3 kB/s"
    assert dense.split() in lines
    dispatch = "dispatch rows tensor all_to_all 1 1.95 KiB 1.46 KiB 300 0% 67% 300-300 5 kB/s"
    assert dispatch.split() in lines
    assert "evenly drawn routes" in text and "is exactly as expected (=)" in text
    slowest = "tensor all_reduce 1000 B 2 2, 3 10 kB/s 0, 1 20 kB/s"
    assert slowest.split() in lines


def test_what_should_be_as_expected_and_is_not_is_named() -> None:
    shown = profile()
    wrong = [replace(row, expected=Amount(2, 4, 9000)) for row in shown.rows]
    text = _printed(replace(shown, rows=wrong))
    assert "these do not depend on routes and yet differ: dense blocks." in text
    assert "4.39 KiB in 2" in text


def test_one_rank_has_nothing_to_say() -> None:
    shown = replace(profile(), world_size=1, categories=[], rows=[], groups=[], alone=[])
    assert "One rank sends nothing." in _printed(shown)


def test_json_has_everything() -> None:
    tree = json.loads(json.dumps(profile_as_json(profile())))
    assert tree["seconds"]["cost"] == pytest.approx(0.01)
    dispatch, dense = tree["rows"]
    assert dense["as_expected"] and not dense["expected_of_drawn_routes"]
    assert not dispatch["as_expected"] and dispatch["expected_of_drawn_routes"]
    assert dense["measured"] == {"ranks": 2, "calls": 2, "payload": 2000}
    assert tree["alone"][0]["size"] == {
        "axis": "tensor",
        "operation": "all_reduce",
        "payload": 1000,
    }


def test_without_other_steps_there_is_no_cost() -> None:
    assert StepSeconds([1.0], [], in_turns=False).cost is None


@pytest.mark.parametrize(
    ("bandwidth", "shown"),
    [(12.0, "12 B/s"), (999.6, "1 kB/s"), (1.25e9, "1.25 GB/s"), (3.2e12, "3.2 TB/s")],
)
def test_bandwidths_have_decimal_prefixes(bandwidth: float, shown: str) -> None:
    assert in_bytes_per_second(bandwidth) == shown


def _check_picture(path: Path) -> None:
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    for part in (*np.array_split(picture, 3, axis=0), *np.array_split(picture, 3, axis=1)):
        assert part.std() > 0.02, "a part is blank"


def test_charts_are_drawn(tmp_path: Path) -> None:
    write_profile_charts(profile(), tmp_path)
    for name in ("times.png", "bandwidth.png"):
        _check_picture(tmp_path / name)


def test_bars_end_where_the_step_does() -> None:
    """Waiting on moving on the category before, in ms; thousands of ranks make no more patches."""
    shown = profile()
    (axes,) = draw_times(shown).axes
    assert len(axes.patches) == 2 * len(shown.categories) + 1
    assert axes.get_ylim()[1] == pytest.approx(1.02 * 1010)
    many = [replace(c, waiting=c.waiting * 1000, moving=c.moving * 1000) for c in shown.categories]
    (axes,) = draw_times(replace(shown, world_size=2000, categories=many)).axes
    assert len(axes.patches) == 2 * len(shown.categories) + 1


def test_a_run_of_one_rank_has_charts(tmp_path: Path) -> None:
    empty = joined([])
    shown = replace(profile(), world_size=1, rows=[], alone=[], categories=[], groups=[])
    assert group_rows(empty, 1) == []
    write_profile_charts(shown, tmp_path)
    assert (tmp_path / "times.png").exists()


def test_a_sweep_is_told_and_drawn(tmp_path: Path) -> None:
    alone = [
        Alone(Size(axis, "all_reduce", 4**n), ranks, 1e-3, n * speed, n * speed)
        for axis, ranks, speed in (
            ("tensor", "0, 1", 1e6),
            ("tensor", "2, 3", 5e5),
            ("data", "", 1e7),
        )
        for n in range(5, 9)
    ]
    stream = io.StringIO()
    print_sweep(alone, stream)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["1.00", "KiB", "2.5", "MB/s"] in lines and ["64.00", "KiB", "80", "MB/s"] in lines
    write_sweep_chart(alone, tmp_path / "sweep.png")
    _check_picture(tmp_path / "sweep.png")

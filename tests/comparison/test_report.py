"""A comparison as files and on a terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from tests.comparison.made_up import comparison, diverged, result, three, with_noise
from uoe_parallel.comparison.curves import draw_differences, draw_losses
from uoe_parallel.comparison.findings import find
from uoe_parallel.comparison.report import print_report, report_as_markdown, write_report
from uoe_parallel.comparison.tables import in_short, tables
from uoe_parallel.errors import UserError


def test_all_files_are_written_and_hold_everything(tmp_path: Path) -> None:
    dense, better, alike = three().results
    made = comparison([dense, diverged(better, seed=2), alike])
    written = write_report(made, tmp_path / "new")
    names = ["report.json", "report.md", "loss_by_flops.png", "loss_by_tokens.png"]
    assert [path.name for path in written] == [*names, "differences.png"]
    for picture in written[2:]:
        assert np.ptp(imread(picture)) > 0.5
    tree = json.loads(written[0].read_text())
    assert [run["loss"] for run in tree["results"][1]["runs"]] == [1.9, None, 1.88]
    assert len(tree["results"][0]["runs"][0]["curve"]) == 5
    assert tree["config"]["baselines"] == ["dense"]
    assert tree["held_out"]["loss"]["better"]["not_finite"] == 1
    [lost, found] = tree["differences"]
    assert lost["mean"] is None
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert set(tree["at_equal"]) == {"tokens", "flops"}
    assert tree["share_to_reach"]["dense"]["dense"] == pytest.approx(1)
    assert tree["words"]["What the data don't say"]


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder: .*file"):
        write_report(three(), tmp_path / "file" / "report")


def test_markdown_has_whole_tables() -> None:
    page = report_as_markdown(find(three()))
    assert "| better | 1.9000 ± 0.0200 |" in page
    assert "| -0.1000 [-0.1248, -0.0752] |" in page
    blocks = [block for block in page.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables(find(three())))
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    for name in ("loss_by_flops.png", "loss_by_tokens.png", "differences.png"):
        assert f"]({name})" in page


def test_bars_in_descriptions_do_not_break_tables() -> None:
    dense, *others = three().results
    page = report_as_markdown(find(comparison([replace(dense, about="a | b"), *others])))
    assert r"| a \| b |" in page


def test_the_terminal_has_the_tables_and_the_words() -> None:
    console = Console(file=io.StringIO(), width=160)
    print_report(three(), console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for expected in ("Held-out loss", "1.9000 ± 0.0200", "16 k", "not told apart: alike"):
        assert expected in shown


def test_cells_say_what_runs_came_to() -> None:
    held_out, at_equal, shares, trained, ran = tables(find(three()))
    assert held_out.header == ["contender", "loss, nats", "bits/byte", "- dense's"]
    assert held_out.rows[0][-1] == "-"
    assert at_equal.header[1::2] == ["loss at 8 k tokens", "loss at 8 G FLOPs"]
    assert [row[1] for row in shares.rows] == ["100%", "82%", "never"]
    assert trained.rows[1][2:] == [
        *("1 M", "600 k", "0.50", "160", "16 k", "0.016", "0.002", "25 G"),
    ]
    assert ran.rows[1][1:] == ["1.50", "0.900", "feed-forward 4.00", "0.00%", "0.95", "1.00 GiB"]


def test_a_learning_rate_at_an_end_is_marked() -> None:
    dense, better, _ = three().results
    made = comparison([dense, replace(better, learning_rate=4e-3)])
    trained = tables(find(made))[3]
    assert [row[-2] for row in trained.rows] == ["0.002", "0.004 (highest)"]


def test_accuracy_comes_first_in_percent() -> None:
    accuracy, loss = tables(find(replace(three(), task="classification")))[:2]
    assert accuracy.header[1:] == ["accuracy, %", "- dense's"]
    assert accuracy.rows[1][1:] == ["81.00 ± 0.20", "+1.00 [+0.75, +1.25]"]
    assert loss.rows[1][1] == "1.9000 ± 0.0200"


@pytest.mark.parametrize(
    ("number", "text"),
    [(12.0, "12"), (1234567, "1.23 M"), (2.5e12, "2.5 T"), (3.4e15, "3.40e15")],
)
def test_numbers_in_short(number: float, text: str) -> None:
    assert in_short(number) == text


def test_members_of_a_family_look_different() -> None:
    many = [
        result(f"both_{n}", with_noise(2.0, 0, 0), kinds=["feed_forward", "attention"])
        for n in range(12)
    ]
    figure = draw_losses(find(comparison(many, baselines=["both_0"])), "flops")
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_curves_show_losses_and_what_they_are_above_the_reference() -> None:
    figure = draw_losses(find(three()), "flops")
    losses, beside = figure.axes[:2]
    better = dict(zip(("dense", "better", "alike"), losses.get_lines(), strict=True))["better"]
    assert np.asarray(better.get_xdata())[-1] == 8e9
    assert np.asarray(better.get_ydata())[-1] == pytest.approx(1.9)
    above = np.asarray(beside.get_lines()[1].get_ydata())
    np.testing.assert_allclose(above, -0.1, rtol=1e-6)


def test_differences_show_intervals_of_what_can_be_compared() -> None:
    dense, better, alike = three().results
    findings = find(comparison([dense, diverged(better, seed=2), alike]))
    [axes] = draw_differences(findings).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "alike"]
    interval = findings.pairs[1].difference.interval
    drawn = [tuple(np.asarray(line.get_xdata())) for line in axes.get_lines()]
    assert interval in drawn


@pytest.mark.parametrize("losses", [[2.0], [float("inf")] * 2])
def test_reports_of_little(losses: list[float], tmp_path: Path) -> None:
    """A contender alone, with one seed or nothing but diverged runs that were never validated."""
    alone = result("dense", [2.0] * len(losses))
    if losses[0] != 2.0:
        runs = [replace(run, loss=float("inf"), curve=[]) for run in alone.runs]
        alone = replace(alone, runs=runs)
    print_report(comparison([alone]), Console(file=io.StringIO()))
    assert len(write_report(comparison([alone]), tmp_path)) == 5

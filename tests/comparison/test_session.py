"""From contenders to results, with a program that stands for training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.comparison.cases import comparison, quiet
from uoe_parallel.comparison.runs import Runner
from uoe_parallel.comparison.session import Session
from uoe_parallel.errors import UserError


def test_the_best_learning_rate_of_each_is_compared_over_seeds(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="tokens")
    found = Session(given, Runner(given.launch, 2, quiet)).results(2)
    assert (found.task, found.jobs) == ("next_token", 2)
    dense, cheap, routed = found.results
    assert (dense.name, cheap.name, routed.name) == ("dense", "cheap", "routed")
    assert dense.sweep == {
        0.01: pytest.approx(0.01 + 1 / 12 + 0.001),
        0.02: pytest.approx(1 / 12 + 0.001),
    }
    for result in found.results:
        assert (result.learning_rate, result.steps, result.tokens) == (0.02, 40, 40 * 4 * 16)
        assert [run.seed for run in result.runs] == [2, 3]
        assert [run.loss for run in result.runs] == [pytest.approx(x) for x in (0.027, 0.028)]
        assert [run.accuracy for run in result.runs] == [0.5, 0.5]
        [point] = result.runs[0].curve
        assert (point.step, point.tokens) == (40, 2560)
        assert point.flops == pytest.approx(2560 * result.flops_per_token)
        assert result.sweep_flops == pytest.approx(2 * 12 * 64 * result.flops_per_token)
    assert routed.flops_per_token < dense.flops_per_token


def test_a_single_learning_rate_is_everybodys(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="tokens", learning_rates=[0.03])
    found = Session(given, Runner(given.launch, 2, quiet)).results(2)
    assert [(r.learning_rate, r.sweep, r.sweep_flops) for r in found.results] == [(0.03, {}, 0)] * 3


def test_a_budget_of_time_is_measured_first(tmp_path: Path) -> None:
    """By a program whose steps take 0.4 s in runs of 40 steps: all get as many."""
    given = comparison(tmp_path, budget="time")
    said: list[str] = []
    with pytest.raises(UserError, match="a step of cheap has not been timed yet"):
        Session(given, None).results(1)
    found = Session(given, Runner(given.launch, 2, said.append)).results(2)
    assert [line.split()[:2] for line in said[:3]] == [
        ["1/3", "dense:"],
        ["2/3", "cheap:"],
        ["3/3", "routed:"],
    ]
    assert {result.steps for result in found.results} == {40}


def test_what_is_done_can_be_told_before_the_end(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="tokens")
    assert Session(given, None).results(1).results == []
    Session(given, Runner(given.launch, 2, quiet)).results(2)
    missing = tmp_path / "compared" / "tokens" / "cheap" / "compared-3" / "metrics.jsonl"
    missing.unlink()
    told = Session(given, None).results(1)
    assert [result.name for result in told.results] == ["dense", "routed"]


def test_a_run_that_diverged_has_an_infinite_loss(tmp_path: Path) -> None:
    """It is an outcome like any other, and not tried again."""
    stop = {"step": 3, "kind": "event", "gradient_norm": None, "done": "stop"}
    diverge = (
        f'(run_dir / "metrics.jsonl").write_text({json.dumps(stop)!r} + "\\n"), sys.exit(2)'
        ' if rate == 0.01 or "cheap" in str(run_dir) else None'
    )
    given = comparison(tmp_path, diverge, budget="tokens")
    dense, cheap, _ = Session(given, Runner(given.launch, 2, quiet)).results(2).results
    assert dense.sweep[0.01] == math.inf and math.isfinite(dense.sweep[0.02])
    assert dense.learning_rate == 0.02 and math.isfinite(dense.runs[0].loss)
    assert [run.loss for run in cheap.runs] == [math.inf, math.inf]


def test_a_run_that_stopped_for_another_reason_is_not_over(tmp_path: Path) -> None:
    stop = {"step": 3, "kind": "event", "tensor": "a weight", "ranks": [1], "done": "stop"}
    part = f'(run_dir / "metrics.jsonl").write_text({json.dumps(stop)!r} + "\\n"), sys.exit(2)'
    given = comparison(tmp_path, part, budget="tokens")
    with pytest.raises(UserError, match="ended with exit code 2 before its last step"):
        Session(given, Runner(given.launch, 1, quiet)).results(1)


def test_routing_is_averaged_over_blocks_and_the_last_half(tmp_path: Path) -> None:
    names = ("layers.0.attention", "layers.0.feed_forward")
    reports = [
        {
            "kind": "train",
            "step": step,
            "loss": 1.0,
            "seconds/step": 0.1,
            "peak_memory_bytes": 10.0 * step,
            "load_max_over_mean": 99.0,
            **{f"load_max_over_mean/{name}": step + place for place, name in enumerate(names)},
            **{f"experts_per_token/{name}": place + 2.0 for place, name in enumerate(names)},
        }
        for step in (1, 2, 3, 4)
    ]
    lines = "".join(json.dumps(report) + "\n" for report in reports)
    given = comparison(
        tmp_path,
        f'(run_dir / "reports").write_text({lines!r})',
        budget="tokens",
        contenders={"dense": {}},
    )
    trainer = tmp_path / "trainer.py"
    appended = (
        'file.write((run_dir / "reports").read_text())\n    for kind in ("validation", "test"):'
    )
    trainer.write_text(
        trainer.read_text().replace('for kind in ("train", "validation", "test"):', appended)
    )
    [result] = Session(given, Runner(given.launch, 1, quiet)).results(1).results
    [run, _] = result.runs
    assert run.load_max_over_mean == pytest.approx((3 + 4 + 4 + 5) / 4)
    assert run.experts_per_token == {"attention": 2.0, "feed_forward": 3.0}
    assert (run.peak_memory, run.seconds_per_step) == (40, pytest.approx(0.1))
    assert run.dropped_share is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"validate_every": 0}}, "training.validate_every = 0 makes no curve"),
        ({"data": {"test": None}}, "data.test is missing"),
    ],
)
def test_what_could_not_be_judged_is_refused(
    changes: dict[str, dict[str, object]], told: str, tmp_path: Path
) -> None:
    given = comparison(tmp_path)
    for section, fields in changes.items():
        given.run[section].update(fields)
    with pytest.raises(UserError, match=f"contender dense: {told}"):
        Session(given, None)

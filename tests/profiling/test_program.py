"""The program and `profile:` in a run's config, on real ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.profiling.test_trace import check_trace
from tests.programs import Outcome, call_program, metrics, only_complaint, write_run
from uoe_parallel.profiling.program import main

FILES = ["bandwidth.png", "profile.json", "table.txt", "times.png", "trace.json"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp-zero1": {"tensor": 2},
    "dp2-ep2-zero2": {"expert": 2, "zero_stage": 2},
    "dp2-zero3": {"zero_stage": 3},
    "pp2-zero1": {"pipeline": 2},
}


def _profile(*arguments: str) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())


def _profiled(ranks: Ranks, config: Path, *arguments: str) -> Sequence[Outcome]:
    return ranks(2).run(_profile, "--config", str(config), *arguments)


def _check_profile(folder: Path, layout: str, steps: list[int]) -> dict[str, Any]:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    profile = json.loads((folder / "profile.json").read_text())
    assert (profile["layout"], profile["world_size"]) == (layout, 2)
    assert profile["steps"] == steps
    for row in profile["rows"]:
        if not row["expected_of_drawn_routes"]:
            assert row["as_expected"], row
        elif row["purpose"] != "dispatch gates":  # a rank can choose another number of pairs
            assert row["measured"]["calls"] == row["expected"]["calls"]
        assert row["seconds"] >= row["waiting"] >= 0 and row["seconds"] >= row["hidden"] >= 0
        if row["typical_payload"]:
            assert row["bus_bandwidth"] > 0 and row["alone_bandwidth"] > 0, row
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    check_trace(events, 2)
    # A step is as long as on the slowest rank; a trace has microseconds.
    slowest = [max(e["dur"] for e in events if e["name"] == f"step {step}") for step in steps]
    assert profile["seconds"]["counted"] == pytest.approx([1e-6 * dur for dur in slowest], rel=1e-3)
    return profile


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_profile_is_what_was_expected(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """Bytes and calls of all ranks, but for what depends on routes, are those computed."""
    config = write_run(tmp_path, parallel=LAYOUTS[layout], routes={"record": str(tmp_path / "r")})
    outcomes = _profiled(ranks, config, "--steps", "2", "--out", str(tmp_path / "out"))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[1].out == ""
    profile = _check_profile(tmp_path / "out", layout, [3, 6])
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in outcomes[0].out and f"2 ranks, {layout}" in table
    assert "is exactly as expected (=)" in table
    seconds = profile["seconds"]
    assert len(seconds["counted"]) == len(seconds["plain"]) == 2 and seconds["in_turns"]
    assert not (tmp_path / "run").exists() and not (tmp_path / "r").exists()


def test_a_sweep_needs_no_data(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, parallel={"tensor": 2})
    arguments = ("--sweep", "--out", str(tmp_path / "out"), "data.train=none")
    outcomes = ranks(2).run(_swept, "--config", str(config), *arguments)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {one["size"]["axis"] for one in found} == {"tensor", "world"}
    assert (tmp_path / "out" / "sweep.png").exists()
    assert (
        "Alone on all tensor groups at once: the slowest group's bus bandwidth\n" in outcomes[0].out
    )


def _swept(*arguments: str) -> Outcome:
    from uoe_parallel.profiling import alone

    sizes, alone.SWEPT_BYTES = alone.SWEPT_BYTES, (1024,)
    try:
        return _profile(*arguments)
    finally:
        alone.SWEPT_BYTES = sizes


def test_a_config_that_does_not_fit_is_told(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, parallel={"tensor": 4})
    first, second = _profiled(ranks, config)
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert "parallel.tensor" in first.err


def test_a_run_profiles_its_steps(ranks: Ranks, tmp_path: Path) -> None:
    """Once, and trains as without, watched for hangs besides; a run that resumes after them looks
    at nothing."""
    options: dict[str, Any] = {
        "parallel": {"tensor": 2},
        "model": {"task": "masked_token"},  # which takes no time for a sample of text
        "training": {"steps": 5},
    }
    config = write_run(tmp_path, **options)
    window = ("profile.first_step=3", "profile.steps=2")
    watched = (*window, "profile.wait_limit=60")
    outcomes = ranks(2).run(call_program, "--config", str(config), *watched)
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * 2
    folder = tmp_path / "run" / "profile" / "step-3"
    profile = _check_profile(folder, "tp2-sp-zero1", [3, 4])
    # Of the steps before, the third alone: DeepSpeed builds and says more in the first two.
    assert len(profile["seconds"]["plain"]) == 1 and not profile["seconds"]["in_turns"]
    assert f"profile: {folder}" in outcomes[0].out
    for file in folder.iterdir():
        file.unlink()
    more = (*window, "training.steps=6")
    resumed = ranks(2).run(call_program, "--config", str(config), *more)
    assert [outcome.code for outcome in resumed] == [0, 0], resumed
    assert list(folder.iterdir()) == [] and "profile:" not in resumed[0].out
    plain = write_run(tmp_path / "plain", **options)
    ranks(2).run(call_program, "--config", str(plain))
    with_it, without = (
        [record["loss"] for record in metrics(run)][:5]
        for run in (tmp_path / "run", tmp_path / "plain" / "run")
    )
    assert with_it == without and len(without) == 5


def test_a_profile_without_room_ends_the_run(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, parallel={"tensor": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file")
    window = ("profile.first_step=0", "profile.steps=1")
    outcomes = ranks(2).run(call_program, "--config", str(config), *window)
    assert "the profile cannot be written to" in only_complaint(outcomes)

"""A trace that Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.profiling.made_up import joined, two_steps
from uoe_parallel.profiling import trace
from uoe_parallel.profiling.trace import chosen_part, write_trace


def _written(folder: Path) -> list[dict[str, Any]]:
    found, steps = two_steps()
    write_trace(folder / "trace.json", found, steps)
    return json.loads((folder / "trace.json").read_text())["traceEvents"]


def check_trace(events: list[dict[str, Any]], ranks: int) -> None:
    """Slices of a row lie in each other or apart, ends have begins, and each rank has a row."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {rank: f"rank {rank}" for rank in range(ranks)}
    assert {e["ph"] for e in events} <= {"M", "X", "b", "e"}
    assert {e["pid"] for e in events} == {0}
    for rank in range(ranks):
        mine = [e for e in events if e["ph"] == "X" and e["tid"] == rank]
        slices = sorted((e["ts"], -e["dur"]) for e in mine)
        open_until: list[float] = []
        for start, length in slices:
            assert start > -0.01 and length <= 0
            while open_until and open_until[-1] <= start + 0.01:
                open_until.pop()
            assert not open_until or start - length <= open_until[-1] + 0.01
            open_until.append(start - length)
    begins = {(e["id"], e["tid"]): e["ts"] for e in events if e["ph"] == "b"}
    ends = {(e["id"], e["tid"]): e["ts"] for e in events if e["ph"] == "e"}
    assert begins.keys() == ends.keys()
    assert all(begins[key] <= ends[key] for key in begins)


def test_ranks_have_rows_with_what_they_stand_still_for(tmp_path: Path) -> None:
    events = _written(tmp_path)
    check_trace(events, 2)
    step, *slices = [e for e in events if e["ph"] == "X" and e["tid"] == 0 and e["ts"] < 5e6]
    assert (step["name"], step["ts"], step["dur"]) == ("step 5", 0, 1e6)
    shown = {e["name"]: (round(e["ts"]), round(e["dur"])) for e in slices if e["ts"] < 9e5}
    assert shown["dense blocks"] == (0, 400_000)
    assert shown["waits for rank 1"] == (0, 300_000)
    assert shown["dispatch rows"] == (600_000, 100_000)
    hidden = [e for e in events if e["ph"] in "be" and e["tid"] == 1]
    assert [round(e["ts"]) for e in hidden[:2]] == [400_000, 600_000]
    (details,) = (e["args"] for e in events if e["name"] == "dense blocks" and e["ts"] == 0)
    assert details["bytes"] == 1000 and details["group"] == "tensor: 0, 1"


@pytest.mark.parametrize(("most", "chosen", "every"), [(8, {5, 6}, 1), (7, {5}, 1), (1, {5}, 4)])
def test_large_traces_are_cut(
    most: int, chosen: set[int], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four events in each of two steps."""
    monkeypatch.setattr(trace, "MOST_EVENTS", most)
    assert chosen_part(two_steps()[0]) == (chosen, every)


def test_ranks_that_are_left_out_have_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "MOST_EVENTS", 2)
    assert {e.get("tid", 0) for e in _written(tmp_path)} == {0}


def test_one_rank_has_its_steps(tmp_path: Path) -> None:
    _, steps = two_steps()
    write_trace(tmp_path / "trace.json", joined([]), steps[:1])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X"] == ["step 5", "step 6"]

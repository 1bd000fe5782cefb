from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uoe_parallel.training.metrics import (
    Bars,
    MetricsWriter,
    bits_per_byte,
    load_statistics,
    read_metrics,
)


def records(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_lines_are_json_records(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "new" / "run", tensorboard=False)
    metrics.write(10, "train", {"loss": 2.5, "load/a": math.nan})
    metrics.write(10, "validation", {"loss": math.nan, "scale": math.inf})
    assert records(tmp_path / "new" / "run") == [
        {"step": 10, "kind": "train", "loss": 2.5, "load/a": None},
        {"step": 10, "kind": "validation", "loss": None, "scale": None},
    ]
    assert not (tmp_path / "new" / "run" / "tensorboard").exists()


def test_lists_and_bars_are_lists(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    values = {"a": [1, math.nan, -0.5], "b": Bars([0.25, 0.75]), "c": Bars([1.0], [0, math.inf])}
    metrics.write(1, "train", values)
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert line.endswith('"a": [1, null, -0.5], "b": [0.25, 0.75], "c": [1.0]}\n')


def test_tensorboard_shows_bars_as_they_are_and_lists_by_their_values(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=True)
    values = {
        "load": Bars([0.0, 0.25, 0.75]),
        "gates": Bars([0.5, 0.125, 0.375], edges=[0.0, 0.5, 2.0, math.inf]),
        "nothing": Bars([0.0, 0.0]),
        "bias": [-1.0, 3.0, math.nan, 3.0],
        "nobody": [math.nan],
        "loss": 1.0,
    }
    metrics.write(7, "train", values)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}
    assert all([event.step for event in of_tag] == [7] for of_tag in found.values())
    bars = {tag: of_tag[0].histogram_value for tag, of_tag in found.items()}
    assert sorted(bars) == ["train/bias", "train/gates", "train/load", "train/nothing"]
    assert list(bars["train/load"].bucket) == [0.0, 0.25, 0.75]
    assert list(bars["train/load"].bucket_limit) == [0.5, 1.5, 2.5]
    assert (bars["train/load"].min, bars["train/load"].max) == (0.5, 2.5), "empty ends are cut off"
    assert list(bars["train/gates"].bucket) == [0.5, 0.125, 0.375]
    assert list(bars["train/gates"].bucket_limit) == [0.5, 2.0, 3.5]
    assert (bars["train/gates"].min, bars["train/gates"].max) == (0.0, 3.5)
    assert (bars["train/bias"].min, bars["train/bias"].max) == (-1.0, 3.0)
    assert bars["train/bias"].num == 3


def test_a_file_is_read_while_it_is_written(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.write(1, "train", {"loss": 2.0, "load/a": [0.5, 0.5]})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ki')
    assert read_metrics(path) == [{"step": 1, "kind": "train", "loss": 2.0, "load/a": [0.5, 0.5]}]


@pytest.mark.parametrize("kept_bytes", [1, 9, 30, -1])
def test_a_torn_last_line_is_dropped(tmp_path: Path, kept_bytes: int) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.write(1, "train", {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    metrics.write(2, "train", {"loss": 1.0})
    torn = path.read_bytes()[len(whole) :][:kept_bytes]
    path.write_bytes(whole + torn)

    metrics = MetricsWriter(tmp_path, tensorboard=False)
    assert path.read_bytes() == whole
    metrics.write(2, "train", {"loss": 0.5})
    assert [record["loss"] for record in records(tmp_path)] == [2.0, 0.5]


@pytest.mark.parametrize("junk", [b"\0\0\0\0\n", b"\xff\xfe\n", b"[1]\n", b"7\n", b"{}\n", b"\n"])
def test_lines_that_are_no_record_are_dropped(tmp_path: Path, junk: bytes) -> None:
    line = b'{"step": 1, "kind": "train"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line + junk + line)
    MetricsWriter(tmp_path, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == line + line


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    for step in (10, 20, 30, 40):
        metrics.write(step, "train", {"loss": 1.0})
    metrics.write(20, "validation", {"loss": 1.0})

    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.truncate_after(20)
    for step in (30, 40, 50):
        metrics.write(step, "train", {"loss": 2.0})
    assert [(r["step"], r["kind"], r["loss"]) for r in records(tmp_path)] == [
        (10, "train", 1.0),
        (20, "train", 1.0),
        (20, "validation", 1.0),
        (30, "train", 2.0),
        (40, "train", 2.0),
        (50, "train", 2.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing left over"

    metrics.truncate_after(-1)
    assert records(tmp_path) == [], "a run that starts over keeps nothing"


def test_events_stay_when_steps_are_taken_again(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        metrics.write(step, "train", {"loss": 1.0})
    metrics.write(3, "event", {"what": "a jump", "ranks": [0, 2], "loss": math.nan})
    metrics.truncate_after(1)
    metrics.close()
    event = {"step": 3, "kind": "event", "what": "a jump", "ranks": [0, 2], "loss": None}
    assert records(tmp_path) == [{"step": 1, "kind": "train", "loss": 1.0}, event]


def test_tensorboard_reads_the_events_and_hides_those_of_steps_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard orders event files by the second they were made in.
    monkeypatch.setattr(time, "time", itertools.count(1_700_000_000.0).__next__)
    metrics = MetricsWriter(tmp_path, tensorboard=True)
    metrics.truncate_after(-1)
    for step in (0, 1, 2, 3):
        metrics.write(step, "train", {"loss": 8.0, "load/a": 1.0})
    metrics.write(3, "validation", {"loss": 4.0})
    assert scalars(tmp_path)["train/loss"] == [(s, 8.0) for s in range(4)], "readable while open"
    metrics.close()

    metrics = MetricsWriter(tmp_path, tensorboard=True)
    metrics.truncate_after(1)
    metrics.write(2, "train", {"loss": 0.5})
    metrics.close()
    assert scalars(tmp_path) == {
        "train/loss": [(0, 8.0), (1, 8.0), (2, 0.5)],
        "train/load/a": [(0, 1.0), (1, 1.0)],
        "validation/loss": [],
    }


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256)) == pytest.approx(8.0)


def test_load_statistics() -> None:
    counts_LN = torch.tensor(
        [
            [5, 5, 5, 5],  # even
            [9, 0, 0, 0],  # one expert does all
            [3, 3, 0, 0],  # two of four
            [0, 0, 0, 0],  # nothing routed
        ]
    )
    max_over_mean_L, entropy_L = load_statistics(counts_LN)
    assert max_over_mean_L.tolist() == [1.0, 4.0, 2.0, 1.0]
    assert entropy_L.tolist() == pytest.approx([1.0, 0.0, 0.5, 1.0])


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=65))
@example([1] * 5)  # rounds to above 1
def test_load_statistics_stay_in_range(counts: list[int]) -> None:
    max_over_mean_L, entropy_L = load_statistics(torch.tensor([counts]))
    assert 1.0 - 1e-12 <= max_over_mean_L.item() <= len(counts) + 1e-12
    assert 0.0 <= entropy_L.item() <= 1.0

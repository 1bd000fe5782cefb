"""The tool from its command line to its results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.harness import Ranks
from uoe_parallel.benchmark import program
from uoe_parallel.benchmark.program import Section, main
from uoe_parallel.benchmark.sizes import Sizes

TINY = {"tokens": 64, "sequence": 16, "hidden": 32, "ffn": 128, "experts": 4, "top-k": 2}
ARGUMENTS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
SECTIONS = {
    "nothing": Section("tests.benchmark.layers:measure_nothing", ranks=(2, 4)),
    "incomparable": Section("tests.benchmark.layers:compare_nothing"),
    "failing": Section("tests.benchmark.layers:fail", ranks=(1,)),
}


@pytest.fixture(autouse=True)
def _server(ranks: Ranks) -> None:
    """The process that ranks are forked from is the session's, which has one alone."""


@pytest.fixture
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SECTIONS", SECTIONS)


def test_feed_forward(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    asked = ["--only", "feed_forward", "--ranks", "2", "1", "--rounds", "3"]
    assert main([*ARGUMENTS, *asked, "--output", str(output)]) == 0

    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert results["sizes"] == asdict(Sizes()) | {k.replace("-", "_"): v for k, v in TINY.items()}
    assert results["rounds"] == 3
    assert {"torch", "megatron-core", "deepspeed"} == set(results["machine"]["libraries"])
    assert [(s["section"], s["ranks"]) for s in results["sections"]] == [
        ("feed_forward", 1),
        ("feed_forward", 2),
    ]
    out = capfd.readouterr().out
    assert "feed forward, 2 processes with" in out
    assert out.splitlines()[-1] == str(output / "results.json")
    for section in results["sections"]:
        assert section["device"] == "cpu"
        entries = {entry["contender"]: entry for entry in section["entries"]}
        assert len(entries) == 6
        ours, dense = entries["this project"], entries["dense, same active width"]
        for name, entry in entries.items():
            assert "not_measured" not in entry, entry
            assert len(entry["seconds"]) == 3 and min(entry["seconds"]) > 0
            pairs = zip(ours["seconds"], entry["seconds"], strict=True)
            assert entry["ours_over_this"]["median"] == median(a / b for a, b in pairs)
            share = entry["multiply_adds"] / dense["multiply_adds"]
            assert entry["multiply_adds_over_dense"] == share
            assert f"{median(entry['seconds']) * 1e3:.1f}" in out and name in out
        assert (dense["ffn"], entries["dense, full width"]["ffn"]) == (64, 128)


@pytest.mark.usefixtures("_planted")
def test_sections_run_where_they_can(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["--only", "nothing", "--ranks", "1", "2", "--output", str(tmp_path)]
    assert main([*ARGUMENTS, *asked]) == 0
    [section] = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert section["ranks"] == section["entries"][0]["ranks_seen"] == 2
    assert "nothing             2        2.0  1.0 - 3.0\n" in capfd.readouterr().out

    assert main([*ARGUMENTS, "--only", "nothing", "--ranks", "1", "--output", str(tmp_path)]) == 2
    assert capfd.readouterr().err == (
        "bench_layers.py: --ranks 1: nothing to measure; nothing runs on 2, 4 ranks\n"
    )


@pytest.mark.usefixtures("_planted")
def test_a_section_without_result_ends_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["--ranks", "1", "--output", str(tmp_path), "--only"]
    assert main([*ARGUMENTS, *asked, "incomparable"]) == 1
    assert capfd.readouterr().err.splitlines()[1:] == [
        "bench_layers.py: incomparable on 1 rank: not comparable: one computes less than the other"
    ]
    assert main([*ARGUMENTS, *asked, "failing"]) == 1
    err = capfd.readouterr().err
    assert "bench_layers.py: failing on 1 rank: rank 0: RuntimeError: broken on rank 0\n" in err
    assert "in fail" in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": 70}, "--tokens 70: give a multiple of 16, the length of a sequence"),
        ({"sequence": 1, "tokens": 64}, "--sequence 1: give a multiple of 2, the number of ranks"),
        ({"experts": 3, "ffn": 96}, "--experts 3: give a multiple of 2, the number of ranks"),
        ({"ffn": 130}, "--ffn 130: give a multiple of 4, the number of experts"),
        ({"hidden": 40}, "--hidden 40: give a multiple of 16, twice the 8 attention heads"),
        ({"top-k": 5}, "--top-k 5: give at most 4, the number of experts"),
        (
            {"top-k": 1, "ffn": 4},
            "--top-k 1: its experts are 1 wide together, which 2 ranks can't share; change "
            "--top-k, --ffn or --experts",
        ),
    ],
)
def test_mistakes_are_told_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, int], told: str
) -> None:
    words = [word for name, value in (TINY | changes).items() for word in (f"--{name}", str(value))]
    output = tmp_path / "out"
    assert main([*words, "--ranks", "1", "2", "--output", str(output)]) == 2
    assert capfd.readouterr().err == f"bench_layers.py: {told}\n"
    assert not output.exists()


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only", "everything"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            main(words)
        assert words[-1] in capsys.readouterr().err

"""The planner from its command line to its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.planning.cases import MACHINE
from tests.tiny import tiny_config
from uoe_parallel.config import yaml_text
from uoe_parallel.config.load import save_config
from uoe_parallel.errors import UserError
from uoe_parallel.planning.calibrate import calibrate
from uoe_parallel.planning.hardware import load_hardware
from uoe_parallel.planning.program import main


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Options that name a config and a machine."""
    config, machine = tmp_path / "run.yaml", tmp_path / "machine.yaml"
    save_config(tiny_config(parallel={"tensor": 2}), config)
    machine.write_text(yaml_text.dump(MACHINE))
    return ["--config", str(config), "--gpu", str(machine)]


def test_a_plan(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    assert main([*files, "--world", "4", "--json", str(output), "training.recompute=full"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tp2-sp-dp2-zero1 on 4 x round, fp32: 1 micro-batches a step\n")
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line}
    planned = json.loads(output.read_text())
    assert lines["parameters"] == f"{planned['parameters']['total']:,}"
    assert lines["pipeline bubble"] == "0.0%"
    assert lines["utilisation"] == f"{planned['utilisation']:.1%}"
    assert "full (this run)" in out and "dispatch rows" in out and "fragmentation allowance" in out
    assert "\x1b" not in out


def test_a_search(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "search.json"
    assert main([*files, "--search", "--json", str(output)]) == 0
    out = capsys.readouterr().out
    found = json.loads(output.read_text())["found"]
    assert f"{len(found)} layouts fit" in out
    best = yaml_text.parse(out.partition(", the fastest\n")[2])
    assert best["parallel"] == found[0]["parallel"]
    assert best["training"]["micro_batch_size"] == found[0]["micro_batch_size"]


def test_nothing_fits(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(yaml_text.dump(MACHINE | {"memory": 1000}))
    assert main([*files[:2], "--gpu", str(small), "--search"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("plan.py: no layout of 4 devices fits, for the reasons above")
    assert "too much memory" in captured.out
    # A plan says so, and is a plan all the same.
    assert main([*files[:2], "--gpu", str(small)]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_mistakes(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files[:2], "--gpu", "v100"]) == 2
    assert capsys.readouterr().err.startswith("plan.py: --gpu v100: there is no such")
    assert main([*files, "--world", "3"]) == 2
    assert "does not divide the world size of 3 ranks" in capsys.readouterr().err
    for words in ([], [*files, "--calibrate"], [*files, "--world", "0"]):
        with pytest.raises(SystemExit):
            main(words)


@pytest.mark.usefixtures("ranks")
def test_calibration_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "here" / "machine.yaml"
    said = calibrate(2, path)
    assert said.startswith(path.read_text()) and said.endswith(str(path))
    measured = load_hardware(str(path))
    assert measured.devices_per_node == 2
    assert measured.peak("fp32") > 0 and measured.intra_node.latency > 0
    assert measured.intra_node == measured.inter_node


@pytest.mark.usefixtures("ranks")
def test_calibration_tells_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--calibrate: .* cannot be written"):
        calibrate(1, tmp_path / "file" / "machine.yaml")

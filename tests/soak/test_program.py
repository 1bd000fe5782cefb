"""A short soak: a job under torchrun that is killed, asked to leave and damaged loses nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from tests.programs import CHECKOUT, launch
from uoe_parallel.soak.program import main


@pytest.mark.slow
def test_short_soak_loses_nothing(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    folder = tmp_path / "soak"
    faults = "kill,usr1,weight,flipped"
    options = ["--seconds", "300", "--rounds", "1", "--faults", faults, "--folder", folder]
    command = [sys.executable, CHECKOUT / "tools/soak.py", *options, "--json", results]
    outcome = launch(command, timeout=500)

    assert outcome.code == 0, outcome
    assert "4 of 4 faults survived with nothing lost" in outcome.out
    [only] = json.loads(results.read_text())["rounds"]
    assert only["nothing_lost"]
    came = {fault["fault"]: fault for fault in only["faults"]}
    assert len(came) == 4
    assert came["SIGUSR1 to a rank"]["repeated"] == 0
    assert came["bit flipped in the newest checkpoint"]["repeated"] > 0
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert left == []


def test_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--faults", "kill,rust"])
    assert "rust" in capsys.readouterr().err


def test_config_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "missing.yaml"), "--folder", str(tmp_path)]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.touch()
    for folder, word in ((tmp_path, "is not empty"), (own, "exists")):
        assert main(["--folder", str(folder)]) == 2
        assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [own]


def test_results_that_cannot_be_written_are_told_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere" / "results.json"
    assert main(["--folder", str(tmp_path / "soak"), "--json", str(nowhere)]) == 2
    assert f"--json {nowhere}: No such file" in capsys.readouterr().err

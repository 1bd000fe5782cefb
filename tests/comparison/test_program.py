"""The program from its arguments to the files it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.comparison.cases import DENSE, comparison
from tests.tiny import tiny_config
from uoe_parallel.comparison.program import main

FILES = ["differences.png", "loss_by_flops.png", "loss_by_tokens.png", "report.json", "report.md"]


def _write(folder: Path, **fields: Any) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(comparison(folder, **fields).model_dump_json())
    return path


def test_a_comparison_is_told_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(_write(tmp_path)), "--budget", "tokens", "--seeds", "3"]
    assert main([*command, "--plan"]) == 0
    assert "15 runs" in capsys.readouterr().out
    assert main([*command, "--report"]) == 2
    assert "no contender has all its runs yet" in capsys.readouterr().err
    assert main([*command, "--jobs", "3"]) == 0
    told = capsys.readouterr().out
    assert "9/9 " in told and "held-out" in told
    folder = tmp_path / "compared" / "tokens"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == FILES
    found = json.loads((folder / "report.json").read_text())
    assert [result["name"] for result in found["results"]] == ["dense", "cheap", "routed"]
    assert found["config"]["seeds"] == 3
    # Fewer seeds or contenders are a report of what is there.
    assert main([*command[:-2], "--seeds", "2", "--report", "--only", "routed"]) == 0
    found = json.loads((folder / "report.json").read_text())
    assert [result["name"] for result in found["results"]] == ["dense", "routed"]
    assert [len(result["runs"]) for result in found["results"]] == [2, 2]


def test_mistakes_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_write(tmp_path))
    for arguments, told in (
        (["--config", path, "--jobs", "0"], "--jobs 0: name how many runs train at once"),
        (["--config", path, "seeds=none"], "seeds: Input should be a valid integer"),
        (["--config", path, "run.model.num_layers=0"], "model.num_layers = 0 is not an"),
        (["--config", path, "--text", str(tmp_path / "none")], "--text"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("compare_quality: ") and told in error
    assert not (tmp_path / "compared").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_models_are_trained_on_a_text(tmp_path: Path) -> None:
    """By the program itself: four runs, and then none."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles\n" for n in range(2000)))
    run = tiny_config(
        data={"train": "unused"}, training={"steps": 6, "validate_every": 2, "warmup_steps": 1}
    ).model_dump(mode="json", exclude={"run_dir"})
    path = _write(
        tmp_path,
        launch=["python", "-m", "uoe_parallel.pretrain"],
        run=run,
        seeds=1,
        learning_rates=[0.01],
        contenders={"dense": {"change": DENSE}, "routed": {}},
    )
    command = ["--config", str(path), "--text", str(text), "--jobs", "2"]
    assert main(command) == 0
    folder = tmp_path / "compared" / "flops"
    [dense, routed] = json.loads((folder / "report.json").read_text())["results"]
    assert dense["steps"] == 6 < routed["steps"]
    for result in (dense, routed):
        [trained] = result["runs"]
        assert math.isfinite(trained["loss"]) and trained["bits_per_byte"] < 9
        assert len(trained["curve"]) >= 3 and trained["seconds_per_step"] > 0
    assert set(routed["runs"][0]["experts_per_token"]) == {"attention", "feed_forward"}
    written = (folder / "routed" / "compared-8" / "metrics.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (folder / "routed" / "compared-8" / "metrics.jsonl").stat().st_mtime_ns == written

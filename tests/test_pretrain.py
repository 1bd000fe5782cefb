"""The program from its command line to its files, under every launcher that is promised."""

from __future__ import annotations

import math
import pkgutil
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness import Ranks, free_port
from tests.programs import CHECKOUT, Outcome, call_program, launch, metrics, script, write_run
from uoe_parallel.config.load import load_config
from uoe_parallel.pretrain import main

STEPS = 4
ROUTED_BLOCKS = [f"layers.{i}.{kind}" for i in range(2) for kind in ("attention", "feed_forward")]
"""Feed-forward and attention of both layers of the tiny model."""
ENTROPY = "load_entropy/layers.1.attention"
TIMED_PARTS = ("data", "forward", "backward", "optimizer")


class Run(NamedTuple):
    config: Path
    folder: Path
    outcomes: list[Outcome]


@pytest.fixture(scope="module")
def finished(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on two ranks. Tests must not write to its folder."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_run(
        folder,
        parallel={"tensor": 2, "zero_stage": 1},
        training={"steps": STEPS, "warmup_steps": 1, "validate_every": 2},
        checkpoint={"every": 1, "keep": 2},
        logging={"every": 1, "tensorboard": True},
    )
    outcomes = ranks(2).run(call_program, "--config", config, f"training.steps={STEPS}")
    return Run(config, folder / "run", outcomes)


def test_help_names_every_option(ranks: Ranks) -> None:
    [outcome] = ranks(1).run(call_program, "--help")
    assert outcome.code == 0
    for word in ("--config", "--print-config", "--dry-run", "section.field=value", "torchrun"):
        assert word in outcome.out


def test_unknown_option_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    [outcome] = ranks(1).run(call_program, "--config", tmp_path / "run.yaml", "--steps=3")
    assert outcome.code == 2 and "--steps=3" in outcome.err


def test_installed_command_is_the_same_program() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["uoe-pretrain"]) is main


def test_printed_config_loads_back_equal(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"tensor": 2})
    overrides = ['run_dir="folder: of the run"', "training.betas=[0.5, 0.75]", "seed=42"]
    first, second = ranks(2).run(call_program, *overrides, "--print-config", "--config", path)

    assert (first.code, first.err) == (0, "")
    assert second == Outcome(0, "", "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(first.out)
    config = load_config(printed)
    assert config == load_config(path, overrides)
    assert config.seed == 42 and config.run_dir == "folder: of the run"


def test_dry_run_takes_one_step_and_writes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"tensor": 2}, checkpoint={"every": 1})
    before = sorted(tmp_path.rglob("*"))
    first, second = ranks(2).run(call_program, "--config", path, "--dry-run")

    assert (first.code, first.err) == (0, "")
    assert second == Outcome(0, "", "")
    assert sorted(tmp_path.rglob("*")) == before
    cells = _cells(first.out)
    assert abs(float(cells["loss"].split()[0]) - math.log(257)) < 1
    assert float(cells["gradient norm"]) > 0
    assert all(float(cells[f"seconds, {part}"]) >= 0 for part in TIMED_PARTS)


def test_run_succeeds_and_only_rank_0_speaks(finished: Run) -> None:
    first, second = finished.outcomes
    assert (first.code, first.err) == (0, "")
    assert second == Outcome(0, "", "")


def test_run_leaves_its_files(finished: Run) -> None:
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        *("checkpoints", "config.yaml", "metrics.jsonl", "tensorboard")
    ]
    kept = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (STEPS - 1, STEPS)]
    saved = load_config(finished.folder / "config.yaml")
    assert saved == load_config(finished.config, [f"training.steps={STEPS}"])


def test_introduction_tells_model_and_layout(finished: Run) -> None:
    cells = _cells(finished.outcomes[0].out)
    assert "2: tensor 2 x pipeline 1 x data 1" in cells["ranks"] and "ZeRO 1" in cells["ranks"]
    assert "feed-forward 3 of 8 in 2 layers" in cells["experts"]
    assert "attention 2 of 4 in 2 layers" in cells["experts"]
    assert cells["precision"] == "fp32"
    assert cells["experts' products"] == "loop"
    assert "rms_norm" in cells["picked"] and "AdamW" in cells["picked"]


def test_every_step_reports_every_metric(finished: Run) -> None:
    records = metrics(finished.folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert abs(record["loss"] - math.log(257)) < 1
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))
        assert record["gradient_norm"] > 0
        assert record["tokens_per_second"] == pytest.approx(4 * 16 / record["seconds/step"])
        assert record["tokens"] == record["step"] * 4 * 16
        # 10 MiB: no Python with torch in it is smaller; 1 TiB: bytes, not another unit.
        assert 10 * 2**20 < record["peak_memory_bytes"] < 2**40
        parts = [record[f"seconds/{part}"] for part in TIMED_PARTS]
        assert min(parts) > 0 and sum(parts) <= record["seconds/step"]
        steps_left = STEPS - record["step"]
        assert record["eta_seconds"] == pytest.approx(record["seconds/step"] * steps_left)
        for name, lowest, highest in (
            ("load_max_over_mean", 1, 8),
            ("load_entropy", 0, 1),
            ("dropped_share", 0, 0),
        ):
            values = [record[f"{name}/{block}"] for block in ROUTED_BLOCKS]
            assert all(lowest <= value <= highest for value in values)
        loads = [record[f"load_max_over_mean/{block}"] for block in ROUTED_BLOCKS]
        assert record["load_max_over_mean"] == max(loads)
    rates = [record["learning_rate"] for record in records]
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * passed / 3)) for passed in range(3)]
    assert rates == pytest.approx([0.005, *cosine])


def test_each_evaluation_is_recorded_once(finished: Run) -> None:
    first_loss = metrics(finished.folder)[0]["loss"]
    for kind, steps in (("validation", [0, 2, STEPS]), ("test", [STEPS])):
        records = metrics(finished.folder, kind)
        assert [record["step"] for record in records] == steps
        for record in records:
            assert record["loss"] != first_loss
            assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))


def test_tensorboard_has_the_same_numbers(finished: Run) -> None:
    board = EventAccumulator(str(finished.folder / "tensorboard")).Reload()
    records = metrics(finished.folder)
    for tag, values in (
        ("train/loss", [record["loss"] for record in records]),
        ("train/seconds/forward", [record["seconds/forward"] for record in records]),
        (f"train/{ENTROPY}", [record[ENTROPY] for record in records]),
    ):
        events = board.Scalars(tag)
        assert [event.step for event in events] == [record["step"] for record in records]
        assert [event.value for event in events] == pytest.approx(values)
    assert {"validation/loss", "test/bits_per_byte"} <= set(board.Tags()["scalars"])


def test_console_shows_a_line_per_report(finished: Run) -> None:
    out = finished.outcomes[0].out
    for record in metrics(finished.folder):
        [line] = [line for line in out.splitlines() if line.startswith(f"step {record['step']}/4")]
        for shown in (f"loss {record['loss']:8.4f}", "tokens/s", "grad norm", "ETA"):
            assert shown in line


def test_report_ends_with_results_text_files_and_the_way_on(finished: Run) -> None:
    out = finished.outcomes[0].out
    assert "Sampled from the model:\nThe " in out
    _, report = out.split("Finished")
    for kind in ("validation", "test"):
        record = metrics(finished.folder, kind)[-1]
        assert (
            f"{record['loss']:.4f} nats/token = {record['bits_per_byte']:.4f} bits/byte" in report
        )
    assert f"{finished.folder}: config.yaml, metrics.jsonl, tensorboard/, checkpoints/" in report
    # The ranks were started by nothing that a command could repeat.
    assert _way_on(out) == f"the same launch again with training.steps={2 * STEPS}"


def test_second_run_finds_the_checkpoint_and_trains_nothing(
    ranks: Ranks, finished: Run, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    checkpoint = copy / "checkpoints" / f"step-{STEPS:08d}"
    manifest = (checkpoint / "manifest.json").stat()
    arguments = ("--config", finished.config, f"training.steps={STEPS}", f"run_dir={copy}")
    first, second = ranks(2).run(call_program, *arguments)

    assert (first.code, first.err) == (0, "")
    assert second == Outcome(0, "", "")
    assert f"resuming from {checkpoint}: {STEPS} of {STEPS} steps are done" in first.out
    assert "Finished" in first.out
    for kind in ("train", "validation", "test"):
        assert metrics(copy, kind) == metrics(finished.folder, kind)
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == manifest.st_mtime_ns


def test_one_rank_tells_the_command_that_resumes(ranks: Ranks, tmp_path: Path) -> None:
    path, folder = write_run(tmp_path), tmp_path / "the run"
    arguments = ("--config", path, f"run_dir={folder}", "training.steps=1")
    [first] = ranks(1).run(call_program, *arguments)
    python, *command = shlex.split(_way_on(first.out))

    assert (CHECKOUT / python).samefile(sys.executable)
    assert command[:2] == ["-m", "uoe_parallel.pretrain"]
    [second] = ranks(1).run(call_program, *command[2:])
    assert (second.code, second.err) == (0, "")
    assert f"resuming from {folder / 'checkpoints' / 'step-00000001'}" in second.out
    assert [record["step"] for record in metrics(folder)] == [1, 2]


@pytest.mark.slow
def test_torchrun_starts_both_ranks_and_is_told_as_the_way_on(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"tensor": 2}, training={"steps": 2})
    start = ["--standalone", "--nproc-per-node", "2", "-m", "uoe_parallel.pretrain"]
    outcome = launch([script("torchrun"), *start, "--config", path])

    _check_launched(outcome, tmp_path / "run")
    # A torch built for CUDA says so where it finds the toolkit but no GPU.
    said = [line for line in outcome.err.splitlines() if "No CUDA runtime is found" not in line]
    assert said == []
    torchrun, *command = shlex.split(_way_on(outcome.out))
    assert (CHECKOUT / torchrun).samefile(script("torchrun"))
    assert command[: len(start)] == start
    first, second = ranks(2).run(call_program, *command[len(start) :])
    assert (first.code, second.code) == (0, 0)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def _deepspeed() -> list[str]:
    port = str(free_port())
    return [script("deepspeed"), "--num_gpus", "2", "--master_port", port, "--module"]


def _mpirun() -> list[str]:
    return [script("mpirun"), "-n", "2", sys.executable, "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [_deepspeed, _mpirun])
def test_launcher_starts_both_ranks(launcher: Callable[[], list[str]], tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"tensor": 2}, training={"steps": 2})
    outcome = launch([*launcher(), "uoe_parallel.pretrain", "--config", path])

    _check_launched(outcome, tmp_path / "run")
    assert "the same launch again with training.steps=4" in outcome.out


def _check_launched(outcome: Outcome, run_dir: Path) -> None:
    """One run of two steps on two ranks, not two runs on one rank each."""
    assert outcome.code == 0, outcome
    assert (
        outcome.out.count("2: tensor 2 x pipeline 1 x data 1") == outcome.out.count("Finished") == 1
    )
    assert [record["step"] for record in metrics(run_dir)] == [1, 2]


def _cells(out: str) -> dict[str, Any]:
    """Both columns of the printed tables: names are words, followed by two spaces or more."""
    rows = (line.strip().split("  ", 1) for line in out.splitlines() if line.startswith(" "))
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def _way_on(out: str) -> str:
    """What the last line tells to type."""
    intro, way = out.splitlines()[-1].split(": ", 1)
    assert intro == "To go on from here"
    return way

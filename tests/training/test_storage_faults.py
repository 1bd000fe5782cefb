"""Disks that are full, files that are damaged or planted: the program says so, and what was whole
stays so."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import uoe_parallel
from tests.harness import Ranks
from tests.programs import Outcome, call_program, metrics, only_complaint, write_run
from uoe_parallel.checkpoint import find_checkpoint
from uoe_parallel.checkpoint.manifest import MANIFEST_NAME, FileRecord, seal
from uoe_parallel.training.console import TrainingConsole

STEPS = 4
Saved = tuple[Path, list[float]]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The YAML of a finished run on two ranks with a checkpoint of each step, and its losses. Tests
    must not write to its folder."""
    folder = tmp_path_factory.mktemp("saved")
    config = write_run(
        folder,
        # Nothing is sampled from what predicts no next tokens.
        model={"task": "masked_token"},
        parallel={"tensor": 2},
        training={"steps": STEPS},
        checkpoint={"every": 1, "keep": STEPS, "asynchronous": True},
    )
    outcomes = ranks(2).run(call_program, "--config", config)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    return config, [record["loss"] for record in metrics(folder / "run")]


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _copy(saved: Saved, run: Path, step: int) -> tuple[str | Path, ...]:
    """The arguments that continue a copy of the run, which ended after `step`."""
    shutil.copytree(saved[0].parent / "run", run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(_checkpoint(run, later))
    return "--config", saved[0], f"run_dir={run}"


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run)]


def test_every_kind_of_damage_is_named_and_the_newest_whole_checkpoint_used(
    ranks: Ranks, saved: Saved, tmp_path: Path
) -> None:
    arguments = _copy(saved, tmp_path / "run", STEPS)
    shards = {
        step: _checkpoint(tmp_path / "run", step) / "rank-00001.safetensors" for step in (2, 3, 4)
    }
    shards[2].unlink()
    data = bytearray(shards[3].read_bytes())
    data[-1] ^= 1
    shards[3].write_bytes(data)
    shards[4].write_bytes(shards[4].read_bytes()[:-100])
    first, second = ranks(2).run(call_program, *arguments)

    assert (first.code, second.code, second.err) == (0, 0, "")
    warnings = first.err.splitlines()
    told = {2: "No such file", 3: "does not match its checksum", 4: "bytes instead of"}
    for step, warning in zip((4, 3, 2), warnings, strict=True):
        for words in (f"step-0000000{step}", shards[step].name, told[step]):
            assert words in warning
    assert "step-00000001: 1 of 4 steps are done" in first.out
    assert _losses(tmp_path / "run") == saved[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
        refusal = made.stderr.strip()
    except FileNotFoundError as error:
        refusal = str(error)
    if refusal:
        pytest.skip(f"no disk can be mounted here: {refusal}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, room: int) -> None:
    """Leave about `room` bytes."""
    with (folder / "filler").open("wb") as filler:
        free = os.statvfs(folder)
        size = max(free.f_bavail * free.f_frsize - room, 1)
        os.posix_fallocate(filler.fileno(), 0, size)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_that_is_full_of_checkpoints(
    ranks: Ranks, saved: Saved, small_disk: Path, asynchronous: bool
) -> None:
    run = small_disk / "run"
    arguments = (*_copy(saved, run, 2), f"checkpoint.asynchronous={asynchronous}")
    shards = sum(path.stat().st_size for path in _checkpoint(run, 2).iterdir())
    _fill(small_disk, room=shards // 2)
    message = only_complaint(ranks(2).run(call_program, *arguments))

    for words in ("the checkpoint of step 3 ", str(run), "No space left on device", "has room"):
        assert words in message
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    (small_disk / "filler").unlink()
    assert [outcome.code for outcome in ranks(2).run(call_program, *arguments)] == [0, 0]
    assert _losses(run) == saved[1]


def _fill_after_a_report(folder: Path, *arguments: str | Path) -> Outcome:
    """The program, whose disk is full when it has told of a step."""
    report: Callable[..., None] = TrainingConsole.report

    def report_and_fill(*told: object) -> None:
        report(*told)
        if not (folder / "filler").exists():
            _fill(folder, room=0)

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            patch.setattr(TrainingConsole, "report", report_and_fill)
        return call_program(*arguments)


def test_disk_that_is_full_of_metrics(ranks: Ranks, saved: Saved, small_disk: Path) -> None:
    run = small_disk / "run"
    arguments = _copy(saved, run, 1)
    # The last block of a file may have room for some records more.
    more = ("training.steps=40", "checkpoint.every=0")
    call = (_fill_after_a_report, small_disk, *arguments, *more)
    message = only_complaint(ranks(2).run(*call))
    for words in ("the metrics of step ", str(run), "No space left on device", "there is room"):
        assert words in message
    (small_disk / "filler").unlink()
    assert [outcome.code for outcome in ranks(2).run(call_program, *arguments)] == [0, 0]
    assert _losses(run) == saved[1]


def test_disk_that_cannot_be_written(ranks: Ranks, saved: Saved, small_disk: Path) -> None:
    run = small_disk / "run"
    arguments = _copy(saved, run, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = only_complaint(ranks(2).run(call_program, *arguments))
    for words in ("the run folder", str(run), "Read-only file system", "run_dir"):
        assert words in message


class _Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self._mark,)


def test_planted_pickles_are_refused_and_never_run(
    ranks: Ranks, saved: Saved, tmp_path: Path
) -> None:
    """Also one that a manifest vouches for, with its own checksum and the shard's."""
    mark, run = tmp_path / "exploded", tmp_path / "run"
    arguments = _copy(saved, run, 2)
    bomb = pickle.dumps(_Bomb(mark))
    checkpoint = _checkpoint(run, 2)
    for folder, name in (
        *((run, "latest"), (run, "metrics.pkl"), (run / "checkpoints", "latest")),
        *((checkpoint, "mp_rank_00_model_states.pt"), (checkpoint, ".metadata")),
        *((run, "config.yaml"), (checkpoint, "rank-00001.safetensors")),
    ):
        (folder / name).write_bytes(bomb)
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())["manifest"]
    record = FileRecord.of(checkpoint / "rank-00001.safetensors")
    manifest["files"]["rank-00001.safetensors"] = record.model_dump()
    (checkpoint / MANIFEST_NAME).write_text(seal(manifest))
    found = find_checkpoint(run / "checkpoints", None)
    assert found is not None and found.step == 2

    message = only_complaint(ranks(2).run(call_program, *arguments))
    for words in (str(checkpoint), "cannot be read", "SafetensorError"):
        assert words in message
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is a dud"


def test_config_that_would_run_code_is_refused(ranks: Ranks, saved: Saved, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    planted = tmp_path / "planted.yaml"
    call = f"!!python/object/apply:os.mkdir ['{mark}']"
    planted.write_text(saved[0].read_text() + f"\nnotes: {call}\n")
    for arguments in ((planted,), (saved[0], f"run_dir={call}")):
        [outcome] = ranks(1).run(call_program, "--config", *arguments, "--print-config")
        assert outcome.code == 2 and "python/object" in outcome.err
        assert not mark.exists()


RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load"),
    *(
        "yaml.Loader",
        "yaml.UnsafeLoader",
        "yaml.FullLoader",
        "yaml.unsafe_load_all",
        "eval",
        "exec",
    ),
}


def test_package_knows_no_loader_that_runs_code() -> None:
    faults = []
    for path in Path(uoe_parallel.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    used = {alias.name.split(".")[0] for alias in names} & RUNS_CODE
                case ast.ImportFrom(module=str(module), names=names):
                    used = {module.split(".")[0]} & RUNS_CODE
                    used |= {f"{module}.{alias.name}" for alias in names} & LOADS
                case ast.Attribute() | ast.Name():
                    used = {ast.unparse(node)} & LOADS
                case ast.keyword(arg="allow_pickle", value=value):
                    used = set() if ast.unparse(value) == "False" else {"allow_pickle"}
                case ast.keyword(arg="weights_only"):
                    used = {"weights_only"}
                case _:
                    continue
            faults += [f"{path.name}:{node.lineno}: {name}" for name in used]
    assert not faults

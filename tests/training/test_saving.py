"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.model.cases import start
from tests.programs import call_program, metrics, write_run
from tests.tiny import tiny_config
from uoe_parallel.analysis.observe import CollectiveObserver
from uoe_parallel.checkpoint import Piece, find_checkpoint, store
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import CheckpointConfig, RunConfig
from uoe_parallel.errors import Interrupted, UserError
from uoe_parallel.parallel.agreement import broadcast_json
from uoe_parallel.parallel.groups import ParallelGroups, distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.purposes import aside
from uoe_parallel.training import saving
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.saving import Saver
from uoe_parallel.training.trainer import Trainer

DEADLINE = 30.0
"""Seconds for a thread to do what it does in a moment."""
ASYNCHRONOUS = CheckpointConfig(every=1, keep=2, asynchronous=True)


class _SlowDisk:
    """Files are written when the test lets them be."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        save_file: Any = store.save_file

        def write(*args: Any) -> None:
            self.begun.set()
            assert self.free.wait(DEADLINE)
            save_file(*args)

        patch.setattr(store, "save_file", write)


def _saver(folder: Path) -> tuple[Saver, list[str], ParallelGroups]:
    groups, told = start(tiny_config()), []
    return Saver(folder, ASYNCHRONOUS, groups, told.append), told, groups


def _pieces(value: float, groups: ParallelGroups) -> list[Piece]:
    import torch

    return [Piece.whole(f"of rank {groups.rank}", torch.full((3,), value))]


def _train_while_written(folder: Path) -> tuple[list[str], list[str], list[float]]:
    """What was known while the first file waited for the disk, what in the end, and what the newest
    checkpoint holds."""
    saver, told, groups = _saver(folder)
    with pytest.MonkeyPatch.context() as patch, saver:
        disk = _SlowDisk(patch)
        saver.save(1, lambda: _pieces(1.0, groups), {})
        assert disk.begun.wait(DEADLINE)
        broadcast_json("a collective of training", groups.world)
        before = [*told, *(path.name for path in folder.glob("step-????????"))]
        captured_when_written: list[bool] = []

        def capture() -> list[Piece]:
            captured_when_written.append((folder / "step-00000001").exists())
            return _pieces(2.0, groups)

        threading.Timer(0, disk.free.set).start()
        saver.save(2, capture, {})
        broadcast_json(None, groups.world)
        assert captured_when_written == [True]
    reader = find_checkpoint(folder, groups.world)
    assert reader is not None and reader.step == 2
    return before, told, [reader.read(f"of rank {rank}")[0].item() for rank in range(2)]


def test_training_goes_on_while_a_checkpoint_is_written(ranks: Ranks, tmp_path: Path) -> None:
    """And the next one waits for it before it copies anything."""
    for before, told, values in ranks(2).run(_train_while_written, tmp_path):
        assert before == []
        assert [re.sub(r"\d+\.\d+", "#", line) for line in told] == [
            f"checkpoint: {tmp_path}/step-0000000{step} (training stood still # s, written in # s)"
            for step in (1, 2)
        ]
        assert values == [2.0, 2.0]


def _fail_on_rank_1(config: RunConfig) -> tuple[int, str]:
    """The step that this rank stops before, and why."""
    with distributed() as device, pytest.MonkeyPatch.context() as patch:
        groups = start_groups(ParallelLayout.from_config(config.parallel, 2))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))

        def refuse(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        if groups.rank == 1:
            patch.setattr(store, "save_file", refuse)
        trainer.train_step()
        trainer.save()
        if groups.rank == 1:
            # The other may not have heard of it when it comes to the next step.
            thread = trainer.saver._thread
            assert thread is not None
            thread.join(DEADLINE)
            assert trainer.saver.has_failed
        with pytest.raises(UserError) as error:
            trainer.train_step()
        trainer.folder.close()
        return trainer.step, str(error.value)


def test_failed_write_stops_all_ranks_before_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, checkpoint={"asynchronous": True}))
    first, second = ranks(2).run(_fail_on_rank_1, config)
    assert first == second
    assert first[0] == 1
    for word in ("step 1 ", "rank 1", "No space left on device"):
        assert word in first[1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def _leave_by(error: Exception, folder: Path) -> list[str]:
    """What was said by the time of a run's end."""
    saver, told, groups = _saver(folder)
    with pytest.MonkeyPatch.context() as patch:
        disk = _SlowDisk(patch)
        patch.setattr(saving, "_PATIENCE", 0.0)

        def leave() -> None:
            with saver:
                saver.save(1, lambda: _pieces(1.0, groups), {})
                assert disk.begun.wait(DEADLINE)
                if not isinstance(error, ValueError):
                    threading.Timer(0, disk.free.set).start()
                raise error

        with pytest.raises(type(error)):
            leave()
        at_the_end = list(told)
        disk.free.set()
        saver.finish()
    return at_the_end


@pytest.mark.parametrize(
    ("error", "waits"), [(Interrupted(15), True), (UserError("..."), True), (ValueError(), False)]
)
def test_run_waits_for_its_checkpoint_unless_it_breaks_down(
    ranks: Ranks, tmp_path: Path, error: Exception, waits: bool
) -> None:
    [told] = ranks(1).run(_leave_by, error, tmp_path)
    assert len(told) == waits


def _look_on(folder: Path) -> tuple[int, int]:
    """Collectives seen of a thread aside and of this one."""
    groups = start(tiny_config())
    group = Saver(folder, ASYNCHRONOUS, groups, print)._group
    counts = []
    for is_aside in (True, False):
        with CollectiveObserver(groups) as observer:
            thread = threading.Thread(target=_call, args=(is_aside, group))
            thread.start()
            thread.join()
        counts.append(len(observer.calls))
    return counts[0], counts[1]


def _call(is_aside: bool, group: Any) -> None:
    if is_aside:
        with aside():
            broadcast_json("told", group)
    else:
        broadcast_json("told", group)


def test_collectives_of_a_writer_are_not_those_of_the_run(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(_look_on, tmp_path) == [(0, 1), (0, 1)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_program_tells_how_long_training_stood_still(
    ranks: Ranks, tmp_path: Path, asynchronous: bool
) -> None:
    config = write_run(
        tmp_path,
        training={"steps": 3},
        checkpoint={"every": 2, "asynchronous": asynchronous},
        profile={"wait_limit": 60},
    )
    first, second = ranks(2).run(call_program, "--config", config)
    assert (first.code, first.err, second.code, second.out, second.err) == (0, "", 0, "", "")
    lines = [line for line in first.out.splitlines() if line.startswith("checkpoint: ")]
    written = r", written in \d+\.\d\d s" if asynchronous else ""
    assert len(lines) == 2
    for line, step in zip(lines, (2, 3), strict=True):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        stall = rf" \(training stood still \d+\.\d\d s{written}\)"
        assert re.fullmatch(re.escape(f"checkpoint: {folder}") + stall, line), line
    records = metrics(tmp_path / "run")
    assert ["seconds/checkpoint" in record for record in records] == [False, False, True]
    assert records[2]["seconds/checkpoint"] > 0

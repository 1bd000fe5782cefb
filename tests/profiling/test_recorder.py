"""Events tell of every collective what it was for, and when its caller waited."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import Ranks
from tests.model.cases import start
from tests.tiny import tiny_config, write_corpus
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.events import Event
from uoe_parallel.profiling.recorder import Recorder
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

WHO = {
    "tp2 zero 1": (2, {"parallel": {"tensor": 2, "zero_stage": 1}}),
    "dp2 zero 3": (2, {"parallel": {"zero_stage": 3}}),
    "pp2": (2, {"parallel": {"pipeline": 2, "zero_stage": 1}}),
}


def _steps(config: RunConfig) -> list[Event]:
    """The events of two steps, after those in which DeepSpeed has more to say."""
    trainer = Trainer(config, start(config), use_device(0), TrainingConsole(quiet=True))
    for _ in range(2):
        trainer.train_step()
    with Recorder(trainer.groups) as recorder:
        for step in (1, 2):
            recorder.step = step
            trainer.train_step()
    trainer.train_step()
    return recorder.events


@pytest.mark.parametrize("name", WHO)
def test_ranks_tell_of_the_same_collectives(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world, sections = WHO[name]
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_config(**sections, data={"train": str(corpus)}, run_dir=str(tmp_path / "run"))
    first, second = ranks(world).run(_steps, config)
    for event in (*first, *second):
        assert event.started <= event.waited <= event.finished
        assert event.started <= event.ended <= event.finished
        assert event.purpose != Purpose.OTHER and event.axis != "other"
        assert event.step in (1, 2)
    told = [
        {(e.ranks, e.purpose, e.phase, e.step, e.number) for e in events}
        for events in (first, second)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == len(first)


def _exchange_meanwhile() -> list[Event]:
    groups = start(tiny_config(parallel={"tensor": 2}))
    rows, is_over = torch.ones(2, 3), threading.Event()
    with Recorder(groups) as recorder:
        dist.barrier(groups.tensor)
        work = dist.all_to_all_single(torch.empty(2, 3), rows, group=groups.tensor, async_op=True)
        assert work is not None
        work.get_future().add_done_callback(lambda _: is_over.set())
        is_over.wait()
        while not work.is_completed():  # which it says a moment after its callbacks
            time.sleep(0)
        work.wait()
    return recorder.events


def test_what_travels_meanwhile_ends_before_it_is_waited_for(ranks: Ranks) -> None:
    for barrier, rows in ranks(2).run(_exchange_meanwhile):
        assert (barrier.operation, barrier.is_async) == ("barrier", False)
        assert barrier.waited == barrier.started
        assert barrier.ended == barrier.finished
        assert (rows.operation, rows.is_async) == ("all_to_all", True)
        assert barrier.finished <= rows.started < rows.ended == rows.waited < rows.finished
        assert (rows.payload, rows.kept, rows.axis, rows.number) == (24, 12, "tensor", 1)

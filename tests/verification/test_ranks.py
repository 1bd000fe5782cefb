"""Ranks run what they are told, and a run that ends badly says how."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uoe_parallel.verification import ranks as ranks_module
from uoe_parallel.verification.ranks import Failure, LocalRanks

CASES = "tests.verification.cases"

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    local = LocalRanks()

    def run(world_size: int, function: str, *arguments: object, timeout: float = 60) -> Any:
        return local.run(
            world_size, f"{CASES}:{function}", *arguments, logs=tmp_path, timeout=timeout
        )

    return run


@pytest.fixture
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "GRACE", 0.5)


def _assert_nobody_is_left() -> None:
    assert ranks_module.NAME not in [child.name for child in multiprocessing.active_children()]


def test_ranks_meet_and_rank_0_answers(run: Run) -> None:
    assert run(3, "sum_of_ranks", 10) == (10 + 11 + 12, "3")
    assert run(1, "sum_of_ranks", 10) == (10, "1")
    _assert_nobody_is_left()


@pytest.mark.usefixtures("_little_grace")
def test_a_traceback_is_shown_and_others_are_ended(run: Run) -> None:
    failure = run(2, "fail_on_rank_1")
    assert isinstance(failure, Failure)
    assert failure.summary == (
        "rank 1: RuntimeError: broken in two lines; rank 0 did not finish after another failed"
    )
    assert "in fail_on_rank_1" in failure.details and "----- rank 1 of 2" in failure.details
    assert failure.mistake is None
    _assert_nobody_is_left()


@pytest.mark.usefixtures("_little_grace")
def test_a_rank_that_dies_is_named(run: Run) -> None:
    failure = run(2, "die_on_rank_0")
    assert failure.summary == (
        "rank 0: died with exit code 7; rank 1 did not finish after another failed"
    )
    _assert_nobody_is_left()


def test_a_rank_that_hangs_is_named_with_its_stack(run: Run) -> None:
    started = time.monotonic()
    failure = run(3, "hang_on_rank_1", timeout=1)
    assert time.monotonic() - started < 30
    assert failure.summary == "rank 1 did not finish in 1 s"
    assert "----- rank 1 of 3" in failure.details and "in hang_on_rank_1" in failure.details
    _assert_nobody_is_left()


def test_a_mistake_is_told_once(run: Run) -> None:
    assert run(2, "mistake") == Failure("field: no; mend it", "", "field: no; mend it")

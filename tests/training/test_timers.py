from __future__ import annotations

import pytest

from uoe_parallel.training import timers
from uoe_parallel.training.timers import StepTimer


class Device:
    """A clock, and a device that works behind the host: work costs time when waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending = 0.0
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        self.now += self.pending
        self.pending = 0.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(timers, "perf_counter", lambda: device.now)
    return device


def run_step(timer: StepTimer, device: Device, *, parts: bool) -> None:
    with timer.step(parts=parts):
        with timer.part("data"):
            device.now += 1.0  # work of the host
        with timer.part("forward"):
            device.pending += 2.0  # work that the host only launches
        with timer.part("backward"):
            device.pending += 4.0
        device.now += 0.5


def test_parts_own_the_device_work_they_launched(device: Device) -> None:
    timer = StepTimer(device.synchronize)
    run_step(timer, device, parts=False)
    run_step(timer, device, parts=True)
    # The first step's 6 s of device work are waited for before the second step's first part.
    assert timer.take() == {"data": 1.0, "forward": 2.0, "backward": 4.0, "step": 7.5}


def test_steps_without_parts_never_wait(device: Device) -> None:
    timer = StepTimer(device.synchronize)
    run_step(timer, device, parts=False)
    run_step(timer, device, parts=False)
    assert device.waits == 0
    assert timer.take() == {"step": 7.5}, "work left on the device belongs to the steps"


def test_take_starts_over_and_ignores_time_between_steps(device: Device) -> None:
    timer = StepTimer(device.synchronize)
    run_step(timer, device, parts=True)
    timer.take()
    device.now += 100.0  # a validation pass, say
    with timer.part("validation"):
        device.now += 100.0
    assert timer.take() == {}
    run_step(timer, device, parts=True)
    assert timer.take()["step"] == 7.5


def test_a_part_used_twice_in_a_step_adds_up(device: Device) -> None:
    timer = StepTimer(device.synchronize)
    for _ in range(2):
        with timer.step():
            for _ in range(3):  # micro-batches
                with timer.part("forward"):
                    device.now += 1.0
    assert timer.take() == {"forward": 3.0, "step": 3.0}


def test_a_step_that_raises_is_not_counted(device: Device) -> None:
    timer = StepTimer(device.synchronize)

    def fail() -> None:
        with timer.step(), timer.part("forward"):
            device.now += 1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert timer.take() == {}

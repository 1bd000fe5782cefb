"""A seed decides what happens when, and everything happens."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from uoe_parallel.soak.schedule import Fault, Round, nan_step, rounds

STEPS, EVERY = 40, 4
ALONE = (Fault.SKIPPED_NAN, Fault.ROLLED_BACK_NAN, Fault.RESHARDED)
"""Which not every round may have."""


def _rounds(seed: int, number: int, faults: tuple[Fault, ...] = tuple(Fault)) -> list[Round]:
    return list(islice(rounds(seed, ranks=2, steps=STEPS, every=EVERY, faults=faults), number))


def test_seed_decides_everything() -> None:
    assert _rounds(3, 12) == _rounds(3, 12)
    assert _rounds(3, 12) != _rounds(4, 12)


def test_every_fault_comes_as_often_as_others() -> None:
    found = _rounds(1, 24)
    counts = Counter(injection.fault for planned in found for injection in planned.injections)
    assert counts.keys() == set(Fault)
    # In half of the rounds four of the others are drawn, each once before any comes again.
    drawn = Counter(
        injection.fault
        for planned in found
        if planned.reference == "plain" and not planned.is_resharded
        for injection in planned.injections
    )
    assert drawn.keys() == set(Fault) - set(ALONE)
    assert max(drawn.values()) - min(drawn.values()) <= 2
    assert {injection.rank for planned in found for injection in planned.injections} == {0, 1}
    assert {planned.asynchronous for planned in found} == {False, True}


def test_moments_are_in_order_and_leave_room_for_a_recovery() -> None:
    for planned in _rounds(2, 24):
        steps = [injection.step for injection in planned.injections]
        assert steps == sorted(steps) and steps[0] >= 1 and steps[-1] < STEPS - EVERY
        for injection in planned.injections:
            if "NAN" in injection.fault.name:
                assert injection.step == nan_step(STEPS)


def test_runs_that_roll_back_save_when_their_reference_does() -> None:
    """Nothing in them saves at other steps, or takes a checkpoint away."""
    rolled = [planned for planned in _rounds(1, 24) if planned.reference == "roll_back"]
    assert rolled and not any(planned.asynchronous for planned in rolled)
    faults = {injection.fault for planned in rolled for injection in planned.injections}
    assert faults == {Fault.KILL, Fault.STOP, Fault.ROLLED_BACK_NAN}


def test_only_wanted_faults_come() -> None:
    wanted = (Fault.KILL, Fault.RESHARDED)
    found = _rounds(1, 6, wanted)
    assert {injection.fault for r in found for injection in r.injections} == set(wanted)
    # No run without a NaN is held against one with it.
    assert {planned.reference for planned in found} == {"plain"}

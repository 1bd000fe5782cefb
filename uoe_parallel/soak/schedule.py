"""Which fault comes when: drawn from a seed, so that a soak can be repeated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, islice
from random import Random
from typing import Literal


class Fault(StrEnum):
    """What is done to a job."""

    KILL = "kill -9 of a rank"
    KILL_IN_SAVE = "kill -9 of a rank inside a save"
    STOP = "kill -STOP of a rank"
    TERM = "SIGTERM to the launcher"
    USR1 = "SIGUSR1 to a rank"
    TRUNCATED = "newest checkpoint truncated"
    FLIPPED = "bit flipped in the newest checkpoint"
    MISSING = "shard of the newest checkpoint missing"
    SECOND_JOB = "second job on the run folder"
    FULL_DISK = "full disk"
    WEIGHT = "bit flipped in a replicated weight"
    SKIPPED_NAN = "NaN in a gradient, skipped"
    ROLLED_BACK_NAN = "NaN in a gradient, rolled back"
    RESHARDED = "restart under another layout"


DAMAGE = (Fault.TRUNCATED, Fault.FLIPPED, Fault.MISSING)
"""Of checkpoints."""
NOTHING_CHANGES = (
    *(Fault.KILL, Fault.KILL_IN_SAVE, Fault.STOP, Fault.TERM, Fault.USR1, *DAMAGE),
    *(Fault.SECOND_JOB, Fault.FULL_DISK, Fault.WEIGHT),
)
"""Faults after which the curve is that of a run without any."""

Reference = Literal["plain", "skip", "roll_back"]
_KINDS: tuple[Reference | Literal["resharded"], ...] = (
    *("plain", "skip", "plain", "resharded", "plain", "roll_back"),
)


@dataclass(frozen=True)
class Injection:
    """A fault at its moment."""

    fault: Fault
    step: int
    """After which it comes, the run's own count."""
    rank: int
    delay: float
    """Seconds from the end of that step on."""
    call: int
    """Inside a save: at which of the writes that wait for the disk, from 1."""


@dataclass(frozen=True)
class Round:
    """One run from its first step to its last, and what happens to it."""

    reference: Reference
    """The run without faults whose curve it must have: one with the same NaN, if it has one."""
    asynchronous: bool
    """Whether it saves so."""
    injections: tuple[Injection, ...]

    @property
    def is_resharded(self) -> bool:
        return any(injection.fault is Fault.RESHARDED for injection in self.injections)


def rounds(
    seed: int, *, ranks: int, steps: int, every: int, faults: Collection[Fault]
) -> Iterator[Round]:
    """Rounds for ever, of runs of `steps` steps with a checkpoint after each `every`, of which
    `faults` are drawn."""
    random = Random(seed)
    decks = _dealt(NOTHING_CHANGES, faults, random)
    for number in count():
        kind = _KINDS[number % len(_KINDS)]
        if kind == "plain":
            drawn = list(dict.fromkeys(islice(decks, 4)))
            # A job must not end while another one starts beside it.
            drawn.sort(key=lambda fault: fault is not Fault.SECOND_JOB)
        elif kind == "skip":
            drawn = [Fault.TERM, Fault.SKIPPED_NAN, Fault.KILL, Fault.USR1]
        elif kind == "roll_back":
            # What is left out saves at steps at which the reference does not, and a run rolls back
            # to its newest checkpoint.
            drawn = [Fault.KILL, Fault.ROLLED_BACK_NAN, Fault.KILL, Fault.STOP]
        else:
            drawn = [Fault.RESHARDED, Fault.KILL, Fault.RESHARDED, Fault.TERM]
        drawn = [fault for fault in drawn if fault in faults]
        if not drawn:
            continue
        moments = _moments(random, len(drawn), steps, every)
        yield Round(
            reference=_reference(kind, drawn),
            asynchronous=kind != "roll_back" and random.random() < 0.5,
            injections=tuple(
                Injection(
                    fault,
                    nan_step(steps) if fault in _NANS else step,
                    rank=random.randrange(ranks),
                    delay=random.uniform(0.0, 0.3),
                    call=random.randint(1, 2),
                )
                for fault, step in zip(drawn, moments, strict=True)
            ),
        )


def _reference(kind: Reference | Literal["resharded"], drawn: Sequence[Fault]) -> Reference:
    return kind if kind != "resharded" and set(_NANS) & set(drawn) else "plain"


_NANS = (Fault.SKIPPED_NAN, Fault.ROLLED_BACK_NAN)


def nan_step(steps: int) -> int:
    """Where the NaN of a run comes, the same in its reference."""
    return steps // 2 - 1


def _dealt(order: Sequence[Fault], faults: Collection[Fault], random: Random) -> Iterator[Fault]:
    """Those of `order` that are in `faults`, in another order each time round."""
    deck = [fault for fault in order if fault in faults]
    while deck:
        random.shuffle(deck)
        yield from deck


def _moments(random: Random, number: int, steps: int, every: int) -> list[int]:
    """Steps, spread over the run, the last one early enough to be followed by others."""
    usable = steps - every
    width = usable // number
    return [random.randrange(i * width + 1, (i + 1) * width) for i in range(number)]

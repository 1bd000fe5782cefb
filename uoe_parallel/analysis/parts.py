"""Parts of a stage: what each keeps in its forward pass, and holds at the points of its backward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Bytes:
    """What is held for one reason or another."""

    activations: int = 0
    """Kept for backward."""
    dispatch: int = 0
    """Rows on their way between ranks, and those of other ranks that are kept."""
    working: int = 0
    """For as long as something is computed."""

    @property
    def total(self) -> int:
        return self.activations + self.dispatch + self.working

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            self.activations + other.activations,
            self.dispatch + other.dispatch,
            self.working + other.working,
        )

    def times(self, number: int) -> Bytes:
        """So many of these."""
        return Bytes(self.activations * number, self.dispatch * number, self.working * number)


@dataclass(frozen=True)
class Point:
    """A point of a backward pass at which much may be held."""

    held: Bytes
    """Of what was kept, and what is computed with."""
    making: Sequence[nn.Parameter] = ()
    """Parameters whose gradients are computed at this point."""
    made: Sequence[nn.Parameter] = ()
    """Those whose gradients the pass has computed before."""


@dataclass(frozen=True)
class Part:
    """Of a stage, in one micro-batch."""

    kept: Bytes
    """After its forward pass."""
    forward: Bytes
    """The most that its forward pass needs, with what it keeps."""
    points: list[Point] = field(default_factory=list)
    """Of its backward pass, in order."""
    params: Sequence[nn.Parameter] = ()


def joined(parts: Sequence[Part]) -> Part:
    """Parts one after the other as one."""
    below = [Bytes()]
    for part in parts:
        below.append(below[-1] + part.kept)
    forwards = [kept + part.forward for kept, part in zip(below, parts, strict=False)]
    points: list[Point] = []
    made: list[nn.Parameter] = []
    for kept, part in zip(reversed(below[:-1]), reversed(parts), strict=True):
        points += [
            Point(kept + point.held, point.making, (*made, *point.made)) for point in part.points
        ]
        made += part.params
    forward = max(forwards, key=lambda held: held.total)
    return Part(below[-1], forward, points, made)

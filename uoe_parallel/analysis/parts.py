"""Parts of a stage: what each keeps in its forward pass, and holds at the points of its backward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

Numbers = NDArray[np.int64]


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

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The fields."""
        return self.activations, self.dispatch, self.working

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

    @cached_property
    def size(self) -> int:
        """Elements of its parameters' gradients."""
        return elements(self.params)

    @cached_property
    def numbers(self) -> Points:
        """Of its points, with what this part has made alone."""
        return Points(
            held=_table([p.held.numbers for p in self.points], 3),
            making=_table([elements(p.making) for p in self.points]),
            made=_table([elements(p.made) for p in self.points]),
            last=_table([elements(p.made[-1:]) for p in self.points]),
        )


@dataclass(frozen=True)
class Points:
    """N points of a backward pass in numbers, int64."""

    held: Numbers
    """[N, 3], as the fields of `Bytes`."""
    making: Numbers
    """[N]: elements of the parameters whose gradients are computed at a point."""
    made: Numbers
    """[N]: of those whose gradients were computed before, which are the last ones in the model's
    order."""
    last: Numbers
    """[N]: of the last one among these, 0 if there is none."""


@dataclass(frozen=True)
class StagePart:
    """All parts of a stage, in one micro-batch; fields as of `Part`."""

    kept: Bytes
    forward: Bytes
    points: Points


def elements(params: Sequence[nn.Parameter]) -> int:
    """Of the gradients that these get."""
    return sum(param.numel() for param in params if param.requires_grad)


def _table(rows: list[Any], *width: int) -> Numbers:
    return np.array(rows, dtype=np.int64).reshape(-1, *width)


def joined(parts: Sequence[Part]) -> Part:
    """Parts one after the other as one."""
    below, forward = _forward(parts)
    points: list[Point] = []
    made: list[nn.Parameter] = []
    for kept, part in zip(reversed(below[:-1]), reversed(parts), strict=True):
        points += [
            Point(kept + point.held, point.making, (*made, *point.made)) for point in part.points
        ]
        made += part.params
    return Part(below[-1], forward, points, made)


def stacked(parts: Sequence[Part]) -> StagePart:
    """As `joined`, for many parts, of which many are one and the same."""
    below, forward = _forward(parts)
    points: list[Points] = []
    made = last = 0
    for kept, part in zip(reversed(below[:-1]), reversed(parts), strict=True):
        own = part.numbers
        points.append(
            Points(
                held=own.held + np.array(kept.numbers),
                making=own.making,
                made=own.made + made,
                last=np.where(own.made > 0, own.last, last),
            )
        )
        if part.params:
            made, last = made + part.size, elements(part.params[-1:])
    columns = {f: [getattr(p, f) for p in points] for f in ("held", "making", "made", "last")}
    whole = Points(**{name: np.concatenate(arrays) for name, arrays in columns.items()})
    return StagePart(below[-1], forward, whole)


def _forward(parts: Sequence[Part]) -> tuple[list[Bytes], Bytes]:
    """What is kept before each part and after the last one, and the most that is needed."""
    below = [Bytes()]
    for part in parts:
        below.append(below[-1] + part.kept)
    needed = [kept + part.forward for kept, part in zip(below, parts, strict=False)]
    return below, max(needed, key=lambda held: held.total)

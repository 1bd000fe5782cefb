"""Where the time of a training step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

TOTAL = "step"


class StepTimer:
    """Seconds per step, in total and by part.

        with timer.step(parts=is_log_step):
            with timer.part("forward"):
                ...

    An accelerator runs behind the host, so that a part's time is only true when the device is
    waited for at both its ends; doing so at every step would slow the run. Hence steps with
    parts=True wait and time their parts, the others count towards the total alone. Parts are
    not nested. Nothing is a collective: every rank times itself.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """`synchronize` returns once the device has done all its work; on CPU it does nothing."""
        self._synchronize = synchronize
        self._times_parts = False
        self._reset()

    def _reset(self) -> None:
        self._total = 0.0
        self._steps = 0
        self._steps_with_parts = 0
        self._part_totals: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, *, parts: bool = True) -> Iterator[None]:
        """One step; `parts` says whether its parts are timed. A step that raises is not counted."""
        start = perf_counter()
        self._times_parts = parts
        yield
        self._times_parts = False
        self._total += perf_counter() - start
        self._steps += 1
        self._steps_with_parts += parts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part of the current step; a name used several times in a step adds up.

        Outside a step nothing is timed.
        """
        assert name != TOTAL, f"{TOTAL!r} is the whole step"
        if not self._times_parts:
            yield
            return
        self._synchronize()
        start = perf_counter()
        yield
        self._synchronize()
        self._part_totals[name] += perf_counter() - start

    def take(self) -> dict[str, float]:
        """Averages since the last take, in seconds per step; empty if there was no step.

        "step" is the average over all steps, a part's over the steps that timed parts; their sum
        falls short of the step by what lies outside all parts.
        """
        start = perf_counter()
        self._synchronize()  # work that the last step left on the device belongs to it
        self._total += perf_counter() - start
        seconds = {
            name: total / self._steps_with_parts for name, total in self._part_totals.items()
        }
        if self._steps:
            seconds[TOTAL] = self._total / self._steps
        self._reset()
        return seconds

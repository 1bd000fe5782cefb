"""Who looks on while a run trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class StepObserver(Protocol):
    """Stands around every training step, the one that was given first the outermost."""

    def step(self, number: int) -> AbstractContextManager[object]:
        """What is around training step `number`, from 0, on every rank alike."""
        ...

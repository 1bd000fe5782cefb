"""Steps that must not move the weights: which they are, and what is done about them.

Large runs meet losses that jump, and gradients that a broken device made infinite. Skipping such a
step, or going back to a checkpoint and past the data of the step, is what cures it in practice
(PaLM, arXiv 2204.02311, section 5.1; OLMo 2, arXiv 2501.00656).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from uoe_parallel.config.schema import AnomaliesConfig

Action = Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True)
class Anomaly:
    """Of a step whose gradients were thrown away."""

    what: str
    """Such as "the loss of step 7 is nan"."""
    action: Action


class Guard:
    """Judges each step by its loss and gradient norm, before the optimizer moves.

    These are the same on every rank, and so is what follows from them. A spike lies more than
    `spike_sigmas` standard deviations above the mean of the last steps that were taken, as in
    OLMo-core (SkipStepOptimizer), which also skips what lies as far below, and lets what it
    skipped into the window.
    """

    def __init__(self, config: AnomaliesConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row = 0
        self._furthest = -1
        """The last step, from 0, that had an anomaly: a later one that is taken ends the row."""

    def judge(self, step: int, loss: float, norm: float) -> Anomaly | None:
        """What is wrong with `step`, from 0; None if the optimizer may move, which is noted."""
        config = self._config
        values = {"loss": (loss, self._losses), "gradient norm": (norm, self._norms)}
        for name, (value, _) in values.items():
            if not math.isfinite(value):
                return self._anomaly(step, f"{name} of step {step + 1} is {value}")
        for name, (value, history) in values.items():
            sigmas = self._sigmas(value, history)
            if config.spike != "ignore" and sigmas > config.spike_sigmas:
                what = f"{name} of step {step + 1} is {value:.4g}, {sigmas:.1f} standard deviations"
                what += f" above the mean of {len(history)} steps"
                return self._anomaly(step, what, config.spike)
        for value, history in values.values():
            history.append(value)
        if step > self._furthest:
            self._in_a_row = 0
        return None

    def count(self, step: int) -> bool:
        """Note an anomaly at `step`; whether it is one too many in a row."""
        self._in_a_row += 1
        self._furthest = max(self._furthest, step)
        return self._in_a_row >= self._config.limit

    def as_state(self) -> dict[str, JsonValue]:
        """What a run needs to judge on as if it had not been interrupted, as finite JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "furthest": self._furthest,
        }

    def as_tensor(self) -> Tensor:
        """The same as numbers, fp64."""
        numbers = [*self._losses, *self._norms, self._in_a_row, self._furthest]
        return torch.tensor(numbers, dtype=torch.float64)

    def restore(self, state: Any) -> None:
        """Take up what `as_state` gave. A run that goes back keeps count of the row that it is
        in."""
        for history, saved in ((self._losses, "losses"), (self._norms, "norms")):
            history.clear()
            history.extend(state[saved])
        if state["furthest"] > self._furthest:
            self._in_a_row, self._furthest = state["in_a_row"], state["furthest"]

    def _anomaly(self, step: int, what: str, action: Action | None = None) -> Anomaly:
        what, action = f"the {what}", action or self._config.not_finite
        if self.count(step):
            action = "stop"
        if self._in_a_row > 1:
            what += f" (anomaly {self._in_a_row} in a row)"
        return Anomaly(what, action)

    def _sigmas(self, value: float, history: Sequence[float]) -> float:
        """How many standard deviations of the window `value` lies above its mean; 0 as long as
        the window is less than half full."""
        if len(history) < max(2, self._config.spike_window / 2):
            return 0.0
        above = value - float(np.mean(history))
        deviation = float(np.std(history, ddof=1))
        if deviation == 0:
            return math.inf if above > 0 else 0.0
        return above / deviation

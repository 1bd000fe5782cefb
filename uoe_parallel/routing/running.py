"""State of rules that moves between optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Running(ABC):
    """A rule that learns from the tokens of a step and moves once it is over.

    `state` is the same on all ranks, for all micro-batches of a step and in recomputation, is
    frozen in evaluation, and goes into checkpoints. What `observe` saw of this rank's tokens is
    summed over all ranks that have others, and `move` gets the sums.
    """

    state: dict[str, Tensor]
    """fp64, on the CPU or on the device of the scores."""
    observed: Tensor
    """fp64 vector of sums over this rank's tokens since the last move."""

    @abstractmethod
    def observe(self, scores_SBE: Tensor, mask_SBE: Tensor, counted_SB: Tensor) -> None:
        """Add a training pass: scores without gradients (-inf where an expert could not be chosen),
        the choice, and the tokens that stand for a unit each."""

    @abstractmethod
    def move(self, observed: Tensor) -> None:
        """Take the sums of a step over all ranks, after the optimizer has moved."""

    @abstractmethod
    def shown(self) -> dict[str, Tensor]:
        """What a report shows: fp64 [E] by name."""

    def reset(self) -> None:
        """Forget what was observed."""
        self.observed = torch.zeros_like(self.observed)

    def to(self, device: torch.device) -> None:
        """Move everything to the device of the scores."""
        self.observed = self.observed.to(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}

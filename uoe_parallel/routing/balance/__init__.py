"""What keeps experts evenly used and scores small: one class in each file, by the names in
`config/rules.py`, and the router z-loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Load:
    """What a loss may look at: scores of some positions, and loads of whole sequences."""

    scores_SBE: Tensor
    """fp32 (or fp64) of each token's unit, with gradients."""
    counted_SB: Tensor
    """bool: the tokens here that stand for a unit each."""
    share_BE: Tensor
    """Each expert's share of the chosen (unit, expert) pairs, of the sequence or of the batch."""
    units_B: Tensor
    """Units of each whole sequence, at least 1."""


class BalanceRule:
    """Base of balance rules, each of which overrides what it works by.

    Built as `rule(config, num_experts)`. It may also be a `Running` rule.
    """

    scope: Literal["none", "sequence", "batch"] = "none"
    """Whose shares the loss gets: of each sequence, or of all sequences of a micro-batch on all
    data-parallel ranks. Without a scope there is no loss."""

    def loss(self, load: Load) -> Tensor:
        """A sum over sequences, one's share of which is about 1 when experts are evenly used.

        Of a shard of the positions it is that shard's part: parts add up to the whole.
        """
        raise NotImplementedError(f"{type(self).__name__} has a scope and no loss")

    def offset(self) -> Tensor | None:
        """[E] to add to scores where experts are chosen, and nowhere else."""
        return None

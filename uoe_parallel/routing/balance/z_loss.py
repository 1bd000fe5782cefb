"""What keeps scores small."""

from __future__ import annotations

from torch import Tensor


def z_loss(scores_SBE: Tensor, counted_SB: Tensor, units_B: Tensor) -> Tensor:
    """Squared log-sum-exp of the scores, the mean over each sequence's units, summed over sequences
    (ST-MoE, arXiv 2202.08906, eq. 5). Shards of a sequence add up."""
    squares_SB = scores_SBE.logsumexp(-1).square() * counted_SB
    return (squares_SB.sum(0) / units_B).sum()
